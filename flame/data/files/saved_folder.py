"""Folders that `save_to_disk` of the `datasets` library wrote."""

from pathlib import Path
from typing import Any, TypedDict

from flame.data.files.local_files import base_split
from flame.errors import UserError, first_line
from flame.storage.json_file import read_object

STATE_FILE = "state.json"
SPLITS_FILE = "dataset_dict.json"


class _DataFile(TypedDict):
    filename: str


class _State(TypedDict):
    _data_files: list[_DataFile]


class _Splits(TypedDict):
    splits: list[str]


def is_saved_folder(path: Path) -> bool:
    """Return whether a folder holds one saved set, or several by split."""
    return (path / STATE_FILE).is_file() or (path / SPLITS_FILE).is_file()


def saved_rows(path: Path, split: str) -> Any:
    """Return a saved set as a `datasets.Dataset`; its files are mapped, not copied.

    Args:
        path: the folder.
        split: the split, or a part of one. A folder of a single set has only `train`.

    Raises:
        UserError: the folder has no such split, or is damaged.
    """
    from datasets import Dataset, concatenate_datasets

    folder = _split_folder(path, base_split(split)) if (path / SPLITS_FILE).is_file() else path
    state = read_object(folder / STATE_FILE, shape=_State)
    files = [folder / Path(entry["filename"]).name for entry in state["_data_files"]]
    try:
        parts = [Dataset.from_file(str(file)) for file in files]
        return concatenate_datasets(parts)
    except (OSError, ValueError, StopIteration) as error:
        raise UserError(f"cannot read {folder}: {first_line(error)}") from error


def _split_folder(path: Path, split: str) -> Path:
    splits = read_object(path / SPLITS_FILE, shape=_Splits)["splits"]
    if split not in splits:
        raise UserError(f"{path} has no split {split!r}: choose from {', '.join(splits)}")
    return path / Path(split).name
