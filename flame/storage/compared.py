"""The steps whose files this job has compared with their hashes, so that it reads them for it once.

A step never changes once it is whole: it is written under another name, and renamed. So it is known
by its place and by the inode and times of its `checksums.json`; a step that is copied or written
anew is another one.
"""

import os
from pathlib import Path

from flame.errors import UserError
from flame.storage.checksums import CHECKSUMS

Identity = tuple[int, int, int]
"""Inode, time of change in ns and size of a step's `checksums.json`.

Processes that see one file system find the same; copies on the disks of several nodes differ, as
nothing that copies a file can set the time of change.
"""

_compared: set[tuple[str, Identity]] = set()
"""Only ever added to: a memo of this process, as `functools.cache` keeps one."""


def identity(step: Path) -> Identity:
    """Return what tells a step from another one in its place.

    Raises:
        UserError: the step has no `checksums.json`.
    """
    try:
        found = os.stat(step / CHECKSUMS)
    except OSError as error:
        raise UserError(f"cannot read {step / CHECKSUMS}: {error.strerror}") from error
    return found.st_ino, found.st_ctime_ns, found.st_size


def is_compared(step: Path) -> bool:
    """Return whether `note_compared` was called for the step that is there now."""
    return (os.path.abspath(step), identity(step)) in _compared


def note_compared(step: Path) -> None:
    """Note that every file of a step has its recorded hash, as this process or a peer found."""
    _compared.add((os.path.abspath(step), identity(step)))
