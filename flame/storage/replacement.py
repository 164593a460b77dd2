"""Putting a finished folder in the place of an older one, so that one of them is always there."""

import ctypes
import os
import shutil
from pathlib import Path

_AT_WORKING_DIRECTORY, _EXCHANGE = -100, 2  # of renameat2(2)


def swap(one: Path, other: Path) -> bool:
    """Exchange two names atomically by renameat2(2); return False if the system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    first, second = os.fsencode(one.absolute()), os.fsencode(other.absolute())
    here = _AT_WORKING_DIRECTORY
    return renameat2(here, first, here, second, _EXCHANGE) == 0


def replace(temporary: Path, path: Path) -> None:
    """Rename `temporary` to `path`, and remove the old `path`.

    One of them exists at every moment if the system can swap names. If not, the old one is kept
    aside for `restore_old` until the new one is in place.
    """
    old = path.parent / f".{path.name}.slimstate.old"
    remove(old)
    if path.exists() and swap(temporary, path):
        return remove(temporary)
    if path.exists():
        os.rename(path, old)
    os.rename(temporary, path)
    remove(old)


def restore_old(path: Path) -> None:
    """Put back an output that a job set aside before it was killed between two renames."""
    old = path.parent / f".{path.name}.slimstate.old"
    if old.exists() and not path.exists():
        os.rename(old, path)


def remove(path: Path) -> None:
    """Remove a file, link or folder, if it is there; a signal is raised at the end."""
    try:
        _remove_once(path)
    finally:
        _remove_once(path)


def _remove_once(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
