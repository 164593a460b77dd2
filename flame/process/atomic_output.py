"""Writing outputs whole or not at all.

An output is written to a hidden sibling and renamed when it is complete, so a reader never meets
half of it. A lock beside the output refuses a second writer. The kernel holds the lock and drops it
when the process dies; the next writer removes what a killed one left behind.
"""

import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TextIO

from flame.errors import UserError

_AT_WORKING_DIRECTORY, _EXCHANGE = -100, 2  # of renameat2(2)


def check_output(path: Path, overwrite: bool = False, inside: Path | None = None) -> None:
    """Raise UserError if the file or folder `path` cannot or must not be written.

    Args:
        overwrite: `path` may exist; it will be replaced.
        inside: a folder that must not contain `path` or be `path`: the source model's.
    """
    path = Path(path)
    if inside is not None and _is_within(path, inside):
        raise UserError(f"output {path} lies inside the model's folder {inside}: choose another")
    if path.exists() and not overwrite:
        raise UserError(f"output {path} exists: choose another, or pass --overwrite to replace it")
    parent = _nearest_existing(path.absolute().parent)
    if not parent.is_dir():
        raise UserError(f"cannot write {path}: {parent} is not a folder")
    if not _is_writable(parent):
        raise UserError(f"cannot write {path}: {parent} is read-only for this user")


def check_file_output(path: Path, overwrite: bool = False, inside: Path | None = None) -> None:
    """`check_output` for a file; a folder of that name raises UserError even with `overwrite`."""
    if Path(path).is_dir():
        raise UserError(f"output {path} is a folder: give the name of a file")
    check_output(path, overwrite, inside)


@contextmanager
def replacing_folder(path: Path, overwrite: bool = False, locked: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling folder that becomes `path` when the block ends without an error.

    Args:
        overwrite: replace an existing `path`; without it one raises UserError.
        locked: the caller holds `writer_lock(path)` already.
    """
    path = Path(path).absolute()
    check_output(path, overwrite)
    with nullcontext() if locked else writer_lock(path):
        _restore_old(path)
        check_output(path, overwrite)
        temporary = path.parent / f".{path.name}.tmp"
        _remove(temporary)
        temporary.mkdir()
        try:
            yield temporary
            _replace(temporary, path)
        except BaseException:
            _remove(temporary)
            raise


@contextmanager
def replacing_file(path: Path, overwrite: bool = False, locked: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling file name that becomes `path` when the block ends without error.

    Args:
        overwrite: replace an existing `path`; without it one raises UserError.
        locked: the caller holds `writer_lock(path)` already.
    """
    path = Path(path).absolute()
    check_file_output(path, overwrite)
    with nullcontext() if locked else writer_lock(path):
        temporary = path.parent / f".{path.name}.tmp"
        try:
            yield temporary
            os.replace(temporary, path)
        except BaseException:
            _remove(temporary)
            raise


@contextmanager
def made_folder(path: Path) -> Iterator[None]:
    """Make the folder `path` and its parents; an error in the block removes `path` if it is new.

    It is removed with all that is in it; parents that were made stay.
    """
    new = not path.exists()
    path.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        if new:
            _remove(path)
        raise


@contextmanager
def replacing_files(folder: Path, first: str, last: str) -> Iterator[Path]:
    """Yield a folder for new files, which move into `folder` when the block ends without an error.

    Each file replaces its older namesake atomically: the one named `first` before the others, the
    one named `last` after them. Call it under a lock: leftovers of a killed caller are removed.
    """
    new = Path(folder) / ".new"
    _remove(new)
    new.mkdir()
    try:
        yield new
        names = sorted(path.name for path in new.iterdir())
        for path in (new / name for name in sorted(names, key=lambda n: (n != first, n == last))):
            target = Path(folder) / path.name
            if path.is_dir():
                _remove(target)
            os.replace(path, target)
    finally:
        _remove(new)


@contextmanager
def writer_lock(path: Path) -> Iterator[None]:
    """Hold the lock beside `path`, making the folders that it lies in; empty ones go at the end.

    Raises:
        UserError: another process holds the lock, or an error in the block says that the disk is
            full.
    """
    path = Path(path).absolute()
    lock_path = path.parent / f".{path.name}.lock"
    with _opened(lock_path, path) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A writer that ended just now may have removed the file that was opened here.
            if os.stat(lock_path).st_ino != os.fstat(lock.fileno()).st_ino:
                raise BlockingIOError
        except OSError as error:
            raise UserError(f"another job is writing {path}: wait for it to end") from error
        try:
            yield
        except BaseException as error:
            if _says_disk_is_full(error):
                raise UserError(
                    f"cannot write {path}: No space left on device: make room, or choose another "
                    "place"
                ) from error
            raise
        finally:
            lock_path.unlink(missing_ok=True)


@contextmanager
def _opened(lock_path: Path, path: Path) -> Iterator[TextIO]:
    """Open the lock file, making the folders of `path`; remove new ones that end up empty."""
    missing = [parent for parent in path.parents if not parent.exists()]
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = open(lock_path, "a")
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from error
        with lock:
            yield lock
    finally:
        for parent in missing:
            with suppress(OSError):
                parent.rmdir()


def _says_disk_is_full(error: BaseException) -> bool:
    """Whether `error` is ENOSPC or EDQUOT, or a library's in Rust that quotes ENOSPC."""
    quoted = f"os error {errno.ENOSPC}" in str(error)
    return quoted or (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT))


def swap(one: Path, other: Path) -> bool:
    """Exchange two names atomically by renameat2(2); return False if the system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    first, second = os.fsencode(one.absolute()), os.fsencode(other.absolute())
    here = _AT_WORKING_DIRECTORY
    return renameat2(here, first, here, second, _EXCHANGE) == 0


def _replace(temporary: Path, path: Path) -> None:
    """Rename `temporary` to `path`, and remove the old `path`.

    One of them exists at every moment if the system can swap names. If not, the old one is kept
    aside for `_restore_old` until the new one is in place.
    """
    old = path.parent / f".{path.name}.old"
    _remove(old)
    if path.exists() and swap(temporary, path):
        return _remove(temporary)
    if path.exists():
        os.rename(path, old)
    os.rename(temporary, path)
    _remove(old)


def _restore_old(path: Path) -> None:
    """Put back an output that a job set aside before it was killed between two renames."""
    old = path.parent / f".{path.name}.old"
    if old.exists() and not path.exists():
        os.rename(old, path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _is_within(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(Path(folder).resolve())


def _nearest_existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _is_writable(folder: Path) -> bool:
    # access(2) allows root everything, even on a read-only mount, so the mode's bits count too.
    return os.access(folder, os.W_OK) and bool(folder.stat().st_mode & 0o222)
