"""Which files of a local folder are read, and which are left out.

Nothing is guessed from words in names: a folder's documents are those of all its data files, in
the order of their paths. Which text is held out is for `data.heldout` or a slice to say.
"""

import logging
import re
from collections.abc import Sequence
from pathlib import Path

from flame.errors import UserError, some

log = logging.getLogger(__name__)

FORMATS = {
    "parquet": (".parquet",),
    "json": (".jsonl", ".json", ".jsonl.gz", ".json.gz"),
    "text": (".txt",),
}
"""Formats with the ends of their files' names."""

METADATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
"""Files in which the `datasets` library describes a set; they hold no documents."""

NAMED = 5
"""Files that a message names."""


def local_path(name: str) -> Path | None:
    """Return the file or folder of a data set, or None where `name` can be a hub name.

    Raises:
        UserError: `name` is a path, and nothing is there.
    """
    path = Path(name)
    if path.exists():
        return path
    if name.startswith("~") and (own := _expanded(path)) is not None and own.exists():
        return own
    suffixes = tuple(suffix for group in FORMATS.values() for suffix in group)
    if name.startswith(("/", ".", "~")) or name.count("/") > 1 or name.endswith(suffixes):
        raise UserError(f"data {name} does not exist: give a file, a folder or a hub name")
    return None


def local_files(path: Path) -> tuple[str, list[Path]]:
    """Return the format of a local file or folder, and its data files, sorted.

    Hidden files are no data. What is taken and what is left out is logged.

    Raises:
        UserError: there is no file of a known format, or there are files of several formats.
    """
    if path.is_file():
        found = _format(path)
        if found is None:
            raise _no_data(path)
        return found, [path]
    files = sorted(p for p in path.rglob("*") if _is_visible(path, p))
    by_format: dict[str, list[Path]] = {}
    for file in files:
        if (form := _format(file)) is not None and file.name not in METADATA:
            by_format.setdefault(form, []).append(file)
    if not by_format:
        raise _no_data(path)
    if len(by_format) > 1:
        raise _several(path, by_format)
    [(form, taken)] = by_format.items()
    left = [file for file in files if file not in set(taken)]
    said = f"; left out: {_names(path, left)}" if left else ""
    log.info("%s: reading %d files: %s%s", path, len(taken), _names(path, taken), said)
    return form, taken


def base_split(split: str) -> str:
    """Return the split that `split` is a part of, such as `train` for `train[:90%]`."""
    return re.split(r"[\[+]", split)[0]


def check_split(path: Path, split: str) -> None:
    """Raise `UserError` unless `split` is `train` or a part of it, as local files have no other."""
    if base_split(split) != "train":
        raise UserError(
            f"{path} has no split {split!r}: files have none but 'train', which is all of them; "
            "give the held-out text as data.heldout, or slices such as 'train[:90%]'"
        )


def _expanded(path: Path) -> Path | None:
    try:
        return path.expanduser()
    except RuntimeError:
        return None


def _is_visible(root: Path, path: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
    return path.is_file() and not hidden


def _format(file: Path) -> str | None:
    name = file.name.lower()
    return next((form for form, suffixes in FORMATS.items() if name.endswith(suffixes)), None)


def _names(root: Path, files: Sequence[Path]) -> str:
    return some([str(file.relative_to(root)) for file in files], NAMED)


def _no_data(path: Path) -> UserError:
    known = ", ".join(suffix for group in FORMATS.values() for suffix in group)
    return UserError(f"{path} holds no data file that can be read: known are {known}")


def _several(path: Path, found: dict[str, list[Path]]) -> UserError:
    kinds = " and ".join(f"{len(files)} of {form}" for form, files in found.items())
    names = "; ".join(_names(path, files) for files in found.values())
    return UserError(
        f"{path} holds files of several formats, {kinds} ({names}): give a folder of one, or a file"
    )
