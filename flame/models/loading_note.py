"""A README for Hugging Face folders whose class is ours: which import loads them."""

from pathlib import Path

from flame.models import MODULES

NOTE = """# A model of family `{model_type}`

The class of this model comes with slimstate; fla and transformers have none of this name. Load it
by

    import flame.register
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(".")

Without the first line transformers refuses `model_type` in config.json.
"""


def write_loading_note(folder: Path, model_type: str) -> None:
    """Write README.md into `folder` if the family is ours and there is none yet."""
    path = folder / "README.md"
    if model_type in MODULES and not path.exists():
        path.write_text(NOTE.format(model_type=model_type))
