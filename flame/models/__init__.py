"""Model classes of our own, with the interfaces of transformers: it and fla have none for these.

- `delta_net2`: DeltaNet whose short convolutions share their kernels.
- `slim_delta_net`, `slim_gated_deltanet`: fla's DeltaNet and Gated DeltaNet with widths that differ
  between layers and heads (`widths.py`), as pruning with shared budgets makes them.
- `glm5_next_text`: transformers' text model of GLM-5.3 with a language-modelling head.

`import flame.register` registers them with `AutoConfig`, `AutoModel` and `AutoModelForCausalLM`;
importing this package alone imports nothing else.
"""

import importlib
import importlib.util
from pathlib import Path

MODULES = ("delta_net2", "slim_delta_net", "slim_gated_deltanet", "glm5_next_text")
"""Modules named by their `model_type`; `CLASSES` in each is (config, decoder, causal model)."""

DECODERS = {"glm5_next_text": "transformers.models.glm5_next"}
"""Where the decoder of a class of ours is another's: releases before 5.23 do not have this one."""

NOTE = """# A model of family `{model_type}`

The causal class of this model comes with slimstate; fla and transformers have none. Load it by

    import flame.register
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(".")

Without the first line transformers knows no causal class for `model_type` in config.json.
"""


def register_classes() -> None:
    """Make transformers' Auto classes know our families; calling it again changes nothing."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    for name in MODULES:
        if name in DECODERS and importlib.util.find_spec(DECODERS[name]) is None:
            continue
        config, decoder, causal = importlib.import_module(f"flame.models.{name}").CLASSES
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, decoder, exist_ok=True)
        AutoModelForCausalLM.register(config, causal, exist_ok=True)


def write_loading_note(folder: Path, model_type: str) -> None:
    """Write a README.md into an HF folder that says which import loads the model.

    Nothing is written for other families' models, nor over a README.md that is there.
    """
    path = folder / "README.md"
    if model_type in MODULES and not path.exists():
        path.write_text(NOTE.format(model_type=model_type))
