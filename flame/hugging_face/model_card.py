"""The README.md of a Hugging Face folder that is written here: how it was made, how to load it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flame.hugging_face.companions import GENERATION_CONFIG, README_FILE, SOURCE_README
from flame.hugging_face.config_file import CONFIG_FILE
from flame.hugging_face.outer_model import text_config
from flame.models import MODULES
from flame.storage.json_file import read_object
from flame.versions import versions

GENERATING = ">=5.6.2,<5.24"
"""Releases of transformers in which fla's models, and ours, generate with their cache."""

_MARK = "library_name: transformers\ntags:\n- slimstate\n"

_CARD = """---
{mark}pipeline_tag: text-generation
---
# {name}

A `{model_type}` language model.

## How it was made

{made}

## Loading it

```python
{imports}from transformers import {auto}{tokenizer_import}

model = {auto}.from_pretrained({name!r})
{tokenizer}```

{notes}
"""


def write_model_card(
    folder: Path, name: str, config: Mapping[str, Any], made: Sequence[str]
) -> None:
    """Write README.md into a Hugging Face folder that is otherwise complete.

    Args:
        folder: the folder.
        name: the name that it will have.
        config: its `config.json`.
        made: sentences that say how it was made, in Markdown.
    """
    model_type = str(config.get("model_type"))
    whole = read_object(folder / CONFIG_FILE)
    is_text = text_config(whole) is None or model_type not in MODULES
    # The class of ours is of the text model alone; the whole is of transformers.
    model_type = model_type if is_text else str(whole["model_type"])
    has_tokenizer = any(folder.glob("tokenizer*")) or (folder / "vocab.json").is_file()
    said = versions()
    software = ", ".join(f"{key} {said[key]}" for key in sorted(said))
    lines = [*made, f"Software: {software}."]
    notes = _notes(folder, model_type)
    text = _CARD.format(
        mark=_MARK,
        name=name,
        model_type=model_type,
        made="\n".join(f"- {line}" for line in lines),
        imports=imports_for(model_type),
        auto="AutoModelForCausalLM" if is_text else "AutoModelForImageTextToText",
        tokenizer_import=", AutoTokenizer" if has_tokenizer else "",
        tokenizer=f"tokenizer = AutoTokenizer.from_pretrained({name!r})\n" if has_tokenizer else "",
        notes="\n".join(notes),
    )
    (folder / README_FILE).write_text(text.rstrip() + "\n")


def is_model_card(path: Path) -> bool:
    """Return whether `write_model_card` wrote a README."""
    with open(path, errors="replace") as stream:
        return stream.read(len(_MARK) + 4) == f"---\n{_MARK}"


def imports_for(model_type: str) -> str:
    """Return the line of Python that must precede loading a model of a family, empty for most."""
    from transformers import CONFIG_MAPPING

    if model_type in MODULES:
        return "import flame.register  # of slimstate: the class of this model comes with it\n"
    module = CONFIG_MAPPING[model_type].__module__ if model_type in CONFIG_MAPPING else ""
    return "import fla  # pip install flash-linear-attention\n" if module.startswith("fla.") else ""


def _notes(folder: Path, model_type: str) -> list[str]:
    notes = []
    if model_type in MODULES:
        notes.append(
            "Without the first line transformers has no causal class for `model_type` in "
            "config.json."
        )
    if imports_for(model_type):
        if model_type not in MODULES:
            notes.append(
                "fla's kernels need a GPU: without one, write `import flame.register` "
                "(of slimstate) in the place of `import fla`."
            )
        notes.append(
            f"Right with transformers {GENERATING}. With fla 0.6, `generate` of 5.24 starts every "
            "token from an empty state, without a word."
        )
    if (folder / GENERATION_CONFIG).is_file():
        notes.append(f"Generation stops as `{GENERATION_CONFIG}` says.")
    if (folder / "plan.json").is_file():
        notes.append("`plan.json` names the channels that were kept.")
    if (folder / SOURCE_README).is_file():
        notes.append(f"`{SOURCE_README}` is the README of the model that this one was made from.")
    return notes
