"""The private folder of a job's launcher, and removing what killed jobs of this user have left.

A launcher that ends removes its folder. One that is killed leaves it behind, and with it the shared
memory of its workers; the next launcher finds the folder's lock free and removes both.
"""

import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from flame.process.file_lock import file_lock

PREFIX = "slimstate-"
LOCK = "lock"

SHARED_MEMORY = Path("/dev/shm")
_SHARED_NAMES = ("sem.mp-", "torch_", "nccl-")
"""How the names begin that Python, torch and NCCL give to shared memory."""

_NEW_SECONDS = 60.0
"""Age below which a folder without a lock belongs to a launcher that is about to make it."""


@contextmanager
def job_folder() -> Iterator[Path]:
    """Yield a new folder that only this user can read; it is removed at the end."""
    sweep()
    with tempfile.TemporaryDirectory(prefix=PREFIX) as name, file_lock(Path(name, LOCK)):
        yield Path(name)


def sweep() -> None:
    """Remove folders and shared memory of this user's jobs that were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError):
            begun = os.lstat(folder)
            if begun.st_uid == os.getuid() and stat.S_ISDIR(begun.st_mode):
                _remove_if_dead(folder, begun.st_ctime)


def _remove_if_dead(folder: Path, changed: float) -> None:
    lock = folder / LOCK
    if not lock.exists():
        if time.time() - changed > _NEW_SECONDS:
            shutil.rmtree(folder)
        return
    begun = lock.stat().st_mtime
    with file_lock(lock) as holder:
        if holder is None:
            _remove_shared_memory(begun)
            shutil.rmtree(folder)


def _remove_shared_memory(since: float) -> None:
    """Remove this user's shared memory that was made since then and that no process holds."""
    held = _held()
    for path in SHARED_MEMORY.glob("*"):
        with suppress(OSError):
            made = os.lstat(path)
            ours = path.name.startswith(_SHARED_NAMES) and made.st_uid == os.getuid()
            if ours and made.st_mtime >= since and str(path) not in held:
                path.unlink()


def _held() -> str:
    """The memory maps of all processes of this user, as text."""
    found = []
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):
            found.append(maps.read_text(errors="replace"))
    return "".join(found)
