"""The embedded corpus: the running interpreter's standard-library source, split by file."""

import hashlib
import os
import sysconfig
from pathlib import Path

from flame.errors import UserError

NAME = "python-stdlib"
SPLITS = ("train", "heldout")
HELDOUT_SHARE = 10
"""One file in this many is held out."""

SKIPPED_FOLDERS = {
    "__pycache__",
    "dist-packages",
    "site-packages",
    # Not on every machine: distributions put these into packages of their own.
    "ensurepip",
    "idle_test",
    "idlelib",
    "lib2to3",
    "test",
    "tests",
    "turtledemo",
    # Tables rather than text.
    "encodings",
    "pydoc_data",
}


def stdlib_texts(split: str, root: Path | None = None) -> list[str]:
    """Return the texts of the source files of `split` (`train` or `heldout`), sorted by path.

    A hash of its path puts a file into a split. So the splits are disjoint, and a file stays in its
    split when others come or go. Raises `UserError` if the split is unknown or has no file.
    """
    if split not in SPLITS:
        raise UserError(f"{NAME} has no split {split!r}: choose {' or '.join(SPLITS)}")
    root = root or Path(sysconfig.get_paths()["stdlib"])
    paths = [path for path in stdlib_files(root) if split_of(path.relative_to(root)) == split]
    texts = [text for path in paths if (text := _read(path)) is not None]
    if not texts:
        raise UserError(
            f"{root} has no Python source: install the interpreter's standard library as files, "
            "or give data.dataset"
        )
    return texts


def stdlib_files(root: Path) -> list[Path]:
    """Return the source files below `root`, sorted, without tests, tables and generated files."""
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS]
        sources = [n for n in names if n.endswith(".py") and not n.startswith("_sysconfigdata")]
        files += [Path(folder, name) for name in sources]
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def split_of(path: Path) -> str:
    """Return the split of the file at `path`, which is relative to the library's folder."""
    digest = hashlib.sha256(path.as_posix().encode()).digest()
    return "heldout" if int.from_bytes(digest[:8], "big") % HELDOUT_SHARE == 0 else "train"


def _read(path: Path) -> str | None:
    try:
        return path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return None
