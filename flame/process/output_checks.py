"""What an output must be before any work is done for it, and which folders may be replaced.

A folder that this program has made holds the file `.slimstate` with the names of what was made in
it. `--overwrite` replaces such a folder as long as nothing else lies in it, and an empty folder; it
never replaces another one.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from flame.errors import UserError, some

MADE = ".slimstate"
_EXPLANATION = "# Made by slimstate: --overwrite replaces this folder if it holds nothing else."


def check_output(path: Path, overwrite: bool = False, inside: Path | None = None) -> None:
    """Raise UserError if the file or folder `path` cannot or must not be written.

    Args:
        overwrite: `path` may exist, if it is a file or a folder that this program made; it will be
            replaced.
        inside: a folder that must not contain `path` or be `path`: the source model's.
    """
    path = Path(path)
    check_place(path, inside)
    if not path.exists():
        return
    if not overwrite:
        raise UserError(f"output {path} exists: choose another, or pass --overwrite to replace it")
    if not path.is_dir() and not path.is_file():
        raise UserError(f"output {path} is a device or a pipe: choose another")
    if _is_mounted(path.resolve()):
        raise UserError(
            f"output {path} is where a disk is mounted, or holds such a place, and cannot be "
            "replaced: choose a folder below it"
        )
    if path.is_dir():
        check_made_here(path)


def check_file_output(path: Path, overwrite: bool = False, inside: Path | None = None) -> None:
    """`check_output` for a file; a folder of that name raises UserError even with `overwrite`."""
    if Path(path).is_dir():
        raise UserError(f"output {path} is a folder: give the name of a file")
    check_output(path, overwrite, inside)


def check_place(path: Path, inside: Path | None = None) -> None:
    """Raise UserError if nothing can be written at `path`, whether it exists or not.

    Args:
        inside: a folder that must not contain `path` or be `path`.
    """
    try:
        _check_place(Path(path), inside)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def check_made_here(folder: Path) -> None:
    """Raise UserError unless a folder is empty, or holds only what this program made in it."""
    names = set(os.listdir(folder)) - {MADE}
    if not names:
        return
    made = _made(folder)
    if made is None:
        raise UserError(
            f"output {folder} was not made by slimstate (it holds {some(sorted(names), 3)}), so "
            "--overwrite does not replace it: choose another, or remove it yourself"
        )
    if names - made:
        raise UserError(
            f"output {folder} holds {some(sorted(names - made), 3)}, which slimstate did not make: "
            "move it away first, or choose another"
        )


def mark_as_made(folder: Path, names: Iterable[str]) -> None:
    """Note in a folder that this program made `names` in it, beside those noted before.

    A folder that held something else before is left without the note: call it on new folders, and
    on folders that have one.
    """
    known = (_made(folder) or set()) | set(names)
    text = "\n".join([_EXPLANATION, *sorted(known - {MADE})])
    (folder / MADE).write_text(f"{text}\n", encoding="utf-8")


def is_marked_or_new(folder: Path) -> bool:
    """Whether `mark_as_made` may be called on a folder: it is missing, empty or has the note."""
    return not folder.exists() or not os.listdir(folder) or _made(folder) is not None


def _made(folder: Path) -> set[str] | None:
    """The names in the folder's note; None if it has none."""
    path = folder / MADE
    if not path.is_file() or path.is_symlink():
        return None
    return set(path.read_text(encoding="utf-8", errors="replace").splitlines()[1:])


def _check_place(path: Path, inside: Path | None) -> None:
    if inside is not None and path.resolve().is_relative_to(Path(inside).resolve()):
        raise UserError(f"output {path} lies inside the model's folder {inside}: choose another")
    _check_link(path)
    parent = path.absolute().parent
    while not parent.exists():
        _check_link(parent)
        parent = parent.parent
    if not parent.is_dir():
        raise UserError(f"cannot write {path}: {parent} is not a folder")
    # access(2) allows root everything, even on a read-only mount, so the mode's bits count too.
    if not (os.access(parent, os.W_OK) and parent.stat().st_mode & 0o222):
        raise UserError(f"cannot write {path}: {parent} is read-only for this user")


def _check_link(path: Path) -> None:
    if path.is_symlink() and not path.exists():
        raise UserError(
            f"output {path} is a link to {os.readlink(path)}, which does not exist: make that, or "
            "remove the link"
        )


def _is_mounted(path: Path) -> bool:
    """Whether something is mounted on `path` or below it: it cannot be renamed or removed then."""
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return os.path.ismount(path)
    # The fifth field is the place, with spaces and the like as octal escapes.
    places = (line.split()[4].decode("unicode_escape").encode("latin-1") for line in lines)
    return any(Path(os.fsdecode(place)).is_relative_to(path) for place in places)
