"""Folders of adapters as peft has them: `adapter_model.safetensors`, `adapter_config.json`."""

from pathlib import Path

from flame.checkpoint.fingerprint import fingerprint
from flame.checkpoint.reference import ModelReference, resolve
from flame.errors import UserError
from flame.hugging_face.companions import README_FILE
from flame.hugging_face.model_card import imports_for
from flame.lora.base import ADAPTER_FILE, ADAPTER_WEIGHTS, BASE_FILE, recorded_base
from flame.storage.json_file import read_object, write_object

_CARD = """---
library_name: peft
base_model: {base}
---
# {name}

Adapters of a `{model_type}` language model. They load with their base:

```python
{imports}from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({base!r}{options})
model = PeftModel.from_pretrained(base, {name!r})
```
{note}"""

_FUSED_NOTE = """
`fuse_swiglu=False` matters: fla's fused kernel reads the weight of `down_proj` and would leave out
its adapter.
"""


def check_adapters(reference: ModelReference, base: str | None = None) -> None:
    """Raise `UserError` unless a peft folder can be made of `reference`.

    It must be a LoRA run or a peft folder, its base one that transformers loads. `base` is as in
    `base_name`.
    """
    if not reference.is_lora:
        raise UserError(f"{reference.folder} holds no adapters: only a LoRA run has a peft folder")
    base_name(reference, base)


def base_name(reference: ModelReference, given: str | None = None) -> str:
    """Return what a peft folder calls its base: an absolute path, or a name on the hub.

    Args:
        reference: a LoRA run or peft folder.
        given: the base as the user calls it, in place of the one that the adapters record. A folder
            is compared with the recorded one by fingerprint; a name on the hub is taken as it is.

    Raises:
        UserError: transformers cannot load the base, or it is another model.
    """
    recorded, expected = recorded_base(reference.folder)
    if given is not None and not Path(given).expanduser().exists():
        return given
    base = reference.base() if given is None else resolve(given)
    if base.kind != "hf" or base.is_lora:
        raise UserError(
            f"the base of the adapters is {base.weights}, which transformers does not load: write "
            f"it with `slimstate convert {base.weights} BASE --to hf`, and give --base BASE"
        )
    if given is None and not (reference.folder / recorded).exists():
        return recorded
    if given is not None and expected not in (None, fingerprint(base.config, base.source())):
        raise UserError(
            f"--base {given} is not the model that the adapters of {reference.folder} were trained "
            f"on ({recorded})"
        )
    return str(base.folder.resolve())


def write_adapters(folder: Path, reference: ModelReference, base: str, name: str) -> None:
    """Write the adapters of a LoRA run, and parameters trained in full, into an existing folder.

    `PeftModel.from_pretrained(base, folder)` loads the result, as its README.md shows. This
    project's `base.json` adds the base's fingerprint.

    Args:
        folder: the folder.
        reference: a LoRA run or peft folder.
        base: what the folder calls the base model, as `base_name` gives it.
        name: what the folder will be called.
    """
    from flame.storage.safetensors_file import save_tensors

    config = read_object(reference.folder / ADAPTER_FILE)
    write_object(folder / ADAPTER_FILE, {**config, "base_model_name_or_path": base})
    if (reference.folder / BASE_FILE).is_file():
        record = read_object(reference.folder / BASE_FILE)
        write_object(folder / BASE_FILE, {**record, "reference": base})
    source = reference.own_source()
    tensors = {name: source.read(name) for name in source.names()}
    save_tensors(tensors, folder / ADAPTER_WEIGHTS)
    (folder / README_FILE).write_text(_card(reference, base, name, list(tensors)))


def loading_line(folder: Path) -> str:
    """Return the lines of Python that load the peft folder `folder` on its base, as one."""
    text = (folder / README_FILE).read_text()
    block = text.partition("```python\n")[2].partition("```")[0]
    return "; ".join(line.partition("  #")[0] for line in block.splitlines() if line)


def _card(reference: ModelReference, base: str, name: str, tensors: list[str]) -> str:
    from flame.model import stock_config

    model_type = str(reference.config.get("model_type"))
    adapted = any(".down_proj.lora_" in tensor for tensor in tensors)
    fused = adapted and getattr(stock_config(reference.config), "fuse_swiglu", False)
    return _CARD.format(
        base=base,
        name=name,
        model_type=model_type,
        imports=imports_for(model_type),
        options=", fuse_swiglu=False" if fused else "",
        note=_FUSED_NOTE if fused else "",
    )
