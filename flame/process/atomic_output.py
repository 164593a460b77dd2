"""Writing outputs whole or not at all.

An output is written to a hidden sibling and renamed when it is complete, so a reader never meets
half of it. A lock beside the output (file_lock.py) refuses a second writer, and the next writer
removes what a killed one left behind.
"""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path

from flame.errors import UserError
from flame.process.file_lock import file_lock
from flame.process.output_checks import check_file_output, check_output, mark_as_made
from flame.storage.replacement import remove, replace, restore_old

_DISK_ERRORS = {
    errno.ENOSPC: "make room, or choose another place",
    errno.EDQUOT: "make room, or choose another place",
    errno.EFBIG: "files of this size are not allowed there (ulimit -f says what is)",
    errno.EIO: "the disk reports a fault",
    errno.EROFS: "choose another place",
    errno.ESTALE: "the file system has gone away",
}
"""What to say of an error that is the disk's, by the system's number."""


@contextmanager
def replacing_folder(path: Path, overwrite: bool = False, locked: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling folder that becomes `path` when the block ends without an error.

    If `path` is a link to a folder, that folder is replaced, on its own disk, and the link stays.
    The files get the permissions of the umask, whatever the libraries that wrote them gave.

    Args:
        overwrite: replace an existing `path`; without it one raises UserError, and so does, in
            any case, a folder that this program did not make (output_checks.py).
        locked: the caller holds `writer_lock(path)` already.
    """
    check_output(path, overwrite)
    path = Path(path).resolve()
    with nullcontext() if locked else writer_lock(path), _explaining_disk(path):
        restore_old(path)
        check_output(path, overwrite)
        temporary = _new_folder(path)
        try:
            yield temporary
            mark_as_made(temporary, os.listdir(temporary))
            _set_permissions(temporary)
            with _explaining(path):
                replace(temporary, path)
        except BaseException:
            remove(temporary)
            raise


@contextmanager
def replacing_file(path: Path, overwrite: bool = False, locked: bool = False) -> Iterator[Path]:
    """Yield a temporary file name that becomes `path` when the block ends without error.

    It lies in a new folder beside `path`, so nothing can wait there under its name. If `path` is a
    link to a file, that file is replaced, and the link stays.

    Args:
        overwrite: replace an existing `path`; without it one raises UserError.
        locked: the caller holds `writer_lock(path)` already.
    """
    check_file_output(path, overwrite)
    path = Path(path).resolve()
    with nullcontext() if locked else writer_lock(path):
        folder = _new_folder(path)
        try:
            yield folder / path.name
            _set_permissions(folder)
            with _explaining(path):
                os.replace(folder / path.name, path)
        finally:
            remove(folder)


def clear_leftovers(path: Path) -> None:
    """Remove what a job left that was killed while it replaced `path`; another writer's is kept."""
    path = Path(path).resolve()
    with writer_lock(path):
        restore_old(path)
        remove(_temporary(path))


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
            remove(path)
        raise


@contextmanager
def replacing_files(folder: Path, first: str, last: str) -> Iterator[Path]:
    """Yield a folder for new files, which move into `folder` when the block ends without an error.

    Each file replaces its older namesake atomically: the one named `first` before the others, the
    one named `last` after them. Call it under a lock: leftovers of a killed caller are removed.
    """
    new = Path(folder) / ".new"
    remove(new)
    new.mkdir()
    try:
        yield new
        _set_permissions(new)
        names = sorted(path.name for path in new.iterdir())
        for path in (new / name for name in sorted(names, key=lambda n: (n != first, n == last))):
            target = Path(folder) / path.name
            if path.is_dir():
                remove(target)
            os.replace(path, target)
    finally:
        remove(new)


@contextmanager
def writer_lock(path: Path) -> Iterator[None]:
    """Hold the lock beside `path`, making the folders that it lies in; empty ones go at the end.

    Raises:
        UserError: another process holds the lock, or an error in the block comes from the disk:
            it is full, broken or allows no such file.
    """
    path = Path(path).resolve()
    lock_path = path.parent / f".{path.name}.lock"
    with ExitStack() as stack:
        with _explaining(path):
            stack.enter_context(_made_parents(path))
            holder = stack.enter_context(file_lock(lock_path, remove=True))
        if holder is not None:
            who = f" ({holder})" if holder else ""
            raise UserError(f"another job is writing {path}{who}: wait for it to end")
        with _explaining_disk(path):
            yield


@contextmanager
def _made_parents(path: Path) -> Iterator[None]:
    """Make the folders that `path` lies in; at the end remove new ones that are empty."""
    missing = [parent for parent in path.parents if not parent.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for parent in missing:
            with suppress(OSError):
                parent.rmdir()


@contextmanager
def _explaining(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into a UserError that says that `path` is not written."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


@contextmanager
def _explaining_disk(path: Path) -> Iterator[None]:
    """Turn an error of the disk in the block, which writes `path`, into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        number = _error_number(error)
        if number not in _DISK_ERRORS:
            raise
        what, file = f"{os.strerror(number)}: {_DISK_ERRORS[number]}", None
        if number in (errno.EIO, errno.ESTALE):
            # It may be the disk that is read from.
            file = getattr(error, "filename", None)
        if isinstance(file, str) and not Path(file).is_relative_to(path.parent):
            raise UserError(f"cannot read {file}: {what}") from error
        raise UserError(f"cannot write {path}: {what}") from error


def _error_number(error: Exception) -> int | None:
    """The system's number of an error, also of one that a library in Rust quotes."""
    if isinstance(error, OSError):
        return error.errno
    quoted = re.search(r"os error (\d+)", str(error))
    return int(quoted[1]) if quoted else None


def _temporary(path: Path) -> Path:
    return path.parent / f".{path.name}.slimstate.tmp"


def _new_folder(path: Path) -> Path:
    """Make the empty temporary folder beside `path`, in the place of one that a killed job left."""
    temporary = _temporary(path)
    remove(temporary)
    # It fails if another program has put a link here since.
    temporary.mkdir()
    return temporary


def _set_permissions(folder: Path) -> None:
    """Give every file below a new folder the permissions that the umask gave the folder."""
    allowed = folder.stat().st_mode & 0o666
    for place, _, names in os.walk(folder):
        for name in names:
            file = os.path.join(place, name)
            # Some file systems have no permissions to set.
            with suppress(OSError):
                if not os.path.islink(file) and os.stat(file).st_mode & 0o777 != allowed:
                    os.chmod(file, allowed)
