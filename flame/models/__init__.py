"""Model classes of our own, with the interfaces of transformers: fla has no class for these.

- `delta_net2`: DeltaNet whose short convolutions share their kernels.
- `slim_delta_net`, `slim_gated_deltanet`: fla's DeltaNet and Gated DeltaNet with widths that differ
  between layers and heads, which is what pruning with shared budgets makes (`widths.py`).

`import flame.register` registers them with `AutoConfig`, `AutoModel` and `AutoModelForCausalLM`;
importing this package alone imports nothing else.
"""

import importlib

MODULES = ("delta_net2", "slim_delta_net", "slim_gated_deltanet")
"""Modules with a `CLASSES` of (config, decoder, causal language model); named by `model_type`."""


def register_classes() -> None:
    """Make transformers' Auto classes know our families; calling it again changes nothing."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    for name in MODULES:
        config, decoder, causal = importlib.import_module(f"flame.models.{name}").CLASSES
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, decoder, exist_ok=True)
        AutoModelForCausalLM.register(config, causal, exist_ok=True)
