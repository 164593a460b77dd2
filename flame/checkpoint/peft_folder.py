"""Folders of adapters as peft has them: `adapter_model.safetensors`, `adapter_config.json`."""

from pathlib import Path

from flame.checkpoint.reference import (
    ADAPTER_FILE,
    ADAPTER_WEIGHTS,
    BASE_FILE,
    ModelReference,
)
from flame.errors import UserError
from flame.storage.json_file import read_object, write_object


def check_adapters(reference: ModelReference) -> None:
    """Raise `UserError` unless `reference` is a LoRA run or a peft folder."""
    if not reference.is_lora:
        raise UserError(f"{reference.folder} holds no adapters: only a LoRA run has a peft folder")


def write_adapters(folder: Path, reference: ModelReference) -> None:
    """Write the adapters of a LoRA run, and parameters trained in full, into an existing folder.

    `PeftModel.from_pretrained(base, folder)` loads the result. The base model is named by its
    absolute path, or by its hub name. This project's `base.json` adds the base's fingerprint.
    """
    from flame.storage.safetensors_file import save_tensors

    config = read_object(reference.folder / ADAPTER_FILE)
    named = config.get("base_model_name_or_path")
    beside = reference.folder / str(named)
    base = str(beside.resolve()) if beside.exists() else named
    write_object(folder / ADAPTER_FILE, {**config, "base_model_name_or_path": base})
    if (reference.folder / BASE_FILE).is_file():
        record = read_object(reference.folder / BASE_FILE)
        write_object(folder / BASE_FILE, {**record, "reference": base})
    source = reference.own_source()
    tensors = {name: source.read(name) for name in source.names()}
    save_tensors(tensors, folder / ADAPTER_WEIGHTS)
