"""A lock that one process of all machines holds by a file, on file systems with flock and without.

Where there is `flock(2)` the kernel holds the lock and drops it when the process dies. Where there
is none (some parallel and network file systems), a second file beside it, made by whoever comes
first, says who holds the lock and since when. A process that is killed leaves that file behind; the
next one on the same machine takes it over, and on another machine a person must remove it.
"""

import errno
import fcntl
import logging
import os
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from flame.errors import UserError

log = logging.getLogger(__name__)

_NO_FLOCK = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


@contextmanager
def file_lock(path: Path, remove: bool = False) -> Iterator[str | None]:
    """Hold the lock `path` inside the block; yield None, or what is known of who else holds it.

    The block runs in either case. The file is opened as it is, never through a link.

    Args:
        path: the lock's file; it is made if it is missing.
        remove: remove the file at the end, if this process holds the lock.

    Raises:
        OSError: the file cannot be made or opened.
    """
    descriptor, held = _open(path), False
    try:
        if _has_flock(path, descriptor):
            held = _flock(path, descriptor)
            yield None if held else ""
        else:
            with _owner_file(path.with_name(f"{path.name}.owner")) as holder:
                held = holder is None
                yield holder
    finally:
        try:
            if held and remove:
                _unlink(path, descriptor)
        finally:
            # A signal may have cut the first try short.
            if held and remove:
                _unlink(path, descriptor)
            os.close(descriptor)


def _unlink(path: Path, descriptor: int) -> None:
    """Remove the file `path` if it is still the one that was opened."""
    if _is_same(path, descriptor):
        path.unlink(missing_ok=True)


def _open(path: Path) -> int:
    # A planted link would make a file elsewhere, and a planted pipe would wait for ever.
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UserError(f"{path} is a link, and should be a lock file: remove it") from error
        raise
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise UserError(f"{path} should be a lock file and is none: remove it")


def _flock(path: Path, descriptor: int) -> bool:
    """Whether this process got the lock of an open file."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    # A holder that ended just now may have removed the file that was opened here.
    return _is_same(path, descriptor)


def _is_same(path: Path, descriptor: int) -> bool:
    try:
        return os.stat(path).st_ino == os.fstat(descriptor).st_ino
    except FileNotFoundError:
        return False


def _has_flock(path: Path, descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    except OSError as error:
        if error.errno not in _NO_FLOCK:
            raise
        _say_once(str(path.parent))
        return False
    return True


@cache
def _say_once(folder: str) -> None:
    log.warning(
        "%s: this file system has no flock, so files named *.owner say who writes; one that a "
        "killed job left on another machine must be removed by hand",
        folder,
    )


@contextmanager
def _owner_file(path: Path) -> Iterator[str | None]:
    """Make the file that says who holds a lock; yield None, or who it says holds it."""
    if not _make(path) and not (_is_left_behind(path) and _make(path)):
        yield f"{_read(path)}; if it has ended, remove {path}"
        return
    try:
        yield None
    finally:
        path.unlink(missing_ok=True)


def _make(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return False
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    with open(descriptor, "w") as stream:
        stream.write(f"process {os.getpid()} on {socket.gethostname()} since {since}")
    return True


def _is_left_behind(path: Path) -> bool:
    """Remove the file of a process of this machine that has ended; return whether it was one."""
    words = _read(path).split()
    if len(words) < 4 or words[3] != socket.gethostname() or not words[1].isdecimal():
        return False
    try:
        os.kill(int(words[1]), 0)
    except ProcessLookupError:
        path.unlink(missing_ok=True)
        return True
    except OSError:
        return False
    return False


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")[:200]
    except OSError:
        return "a job that has just ended"
