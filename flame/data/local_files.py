"""Which files of a local folder hold the documents of a split."""

import re
from pathlib import Path

from flame.errors import UserError

FORMATS = {
    "parquet": (".parquet",),
    "json": (".jsonl", ".json"),
    "text": (".txt",),
}
"""Loaders of the `datasets` library, with their suffixes. In a folder with files for several
loaders, only those of the first are read."""

OTHER_SPLITS = ("test", "validation", "valid", "val", "dev", "eval", "heldout")
"""Words in a file's name that say it is not training data."""


def local_path(name: str) -> Path | None:
    """Return the file or folder of a data set, or None where `name` can be a hub name.

    Raises:
        UserError: `name` is a path, and nothing is there.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    suffixes = tuple(suffix for group in FORMATS.values() for suffix in group)
    if name.startswith(("/", ".", "~")) or name.count("/") > 1 or name.endswith(suffixes):
        raise UserError(f"data {name} does not exist: give a file, a folder or a hub name")
    return None


def local_files(path: Path, split: str) -> tuple[str, list[Path]]:
    """Return the loader for a local file or folder, and its files of a split, sorted.

    A folder's files belong to the split that their path names (`train-00001.parquet`,
    `test/a.txt`). Files that name no split are training data. Raises `UserError` if there is no
    file of a known format, or none of the split.
    """
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if _is_data(path, p))
    for loader, suffixes in FORMATS.items():
        matching = [file for file in files if file.suffix.lower() in suffixes]
        if matching:
            return loader, _of_split(path, matching, base_split(split))
    known = ", ".join(suffix for group in FORMATS.values() for suffix in group)
    raise UserError(f"{path} holds no data file that can be read: known are {known}")


def _is_data(root: Path, path: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
    return path.is_file() and not hidden


def _of_split(root: Path, files: list[Path], split: str) -> list[Path]:
    named = {file: _words(root, file) for file in files}
    chosen = [file for file, words in named.items() if split in words]
    if not chosen and split == "train":
        # A file given by name is what the person wants to read, whatever it is called.
        chosen = [f for f, words in named.items() if root == f or words.isdisjoint(OTHER_SPLITS)]
    if not chosen:
        raise UserError(
            f"{root} has no split {split!r}: no file's name says so "
            f"(found {', '.join(file.name for file in files[:5])}); "
            "give another split, or data.heldout for held-out text"
        )
    return chosen


def _words(root: Path, file: Path) -> set[str]:
    relative = file.name if root == file else file.relative_to(root).as_posix()
    return set(re.split(r"[^a-z0-9]+", relative.lower()))


def base_split(split: str) -> str:
    """Return the split that `split` is a part of, such as `train` for `train[:90%]`."""
    return re.split(r"[\[+]", split)[0]
