"""Swapping two files or folders in one instant, so that a killed writer never leaves neither."""

import ctypes
import os
from pathlib import Path

_AT_WORKING_DIRECTORY, _EXCHANGE = -100, 2


def exchange(one: Path, other: Path) -> bool:
    """Swap two names atomically by renameat2(2); False where the system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    first, second = os.fsencode(one.absolute()), os.fsencode(other.absolute())
    here = _AT_WORKING_DIRECTORY
    return renameat2(here, first, here, second, _EXCHANGE) == 0
