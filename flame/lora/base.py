"""The model that adapters belong to, as their folder names it."""

from pathlib import Path

from flame.errors import UserError
from flame.storage.json_file import read_object

ADAPTER_FILE = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
BASE_FILE = "base.json"
"""In a LoRA run: reference, fingerprint and `config.json` of its base."""

LONGEST_CHAIN = 8
"""Adapters on adapters on a model: how many may lie on each other."""


def is_peft_folder(folder: Path) -> bool:
    """Return whether `folder` holds adapters as peft saves them."""
    return (folder / ADAPTER_FILE).is_file() and (folder / ADAPTER_WEIGHTS).is_file()


def check_no_pickle(folder: Path) -> None:
    """Raise `UserError` for a folder whose adapters are a pickle, as peft saved them once."""
    if (folder / ADAPTER_FILE).is_file() and (folder / "adapter_model.bin").is_file():
        raise UserError(
            f"{folder} holds adapters as a pickle (adapter_model.bin), which can run code: "
            "load and save them with peft once, which writes safetensors"
        )


def recorded_base(folder: Path) -> tuple[str, str | None]:
    """Return reference and fingerprint of the base model of the adapters in `folder`.

    The fingerprint is None for folders that peft wrote, which record none. A relative path is
    relative to `folder`. Raises `UserError` if no base is named.
    """
    path = folder / BASE_FILE
    if not path.is_file() and is_peft_folder(folder):
        path = folder / ADAPTER_FILE
    record = read_object(path)
    name = record.get("reference" if path.name == BASE_FILE else "base_model_name_or_path")
    if not isinstance(name, str) or not name or "\0" in name:
        raise UserError(f"{path} names no base model")
    fingerprint = record.get("fingerprint")
    if not isinstance(fingerprint, str | None):
        raise UserError(f"{path}: fingerprint is {fingerprint!r:.40}, expected 64 digits")
    return name, fingerprint


def check_chain(folders: tuple[Path, ...], base: Path) -> None:
    """Raise `UserError` if adapters on adapters come back to themselves, or are too many.

    Args:
        folders: adapters, each the base of the one before it.
        base: the base of the last.
    """
    if base in folders:
        way = " -> ".join(str(folder) for folder in (*folders[folders.index(base) :], base))
        raise UserError(f"the adapters have themselves as base: {way}")
    if len(folders) >= LONGEST_CHAIN:
        raise UserError(
            f"{folders[0]}: more than {LONGEST_CHAIN} adapters lie on each other: merge some of "
            "them with `slimstate convert --to hf`"
        )
