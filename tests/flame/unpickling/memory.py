"""How much memory a call takes."""

import gc
import re
from collections.abc import Callable
from pathlib import Path

import pytest

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")


def peak_memory(call: Callable[[], None], collect: bool = True) -> int:
    """Bytes by which the process was larger, at most, while `call` ran than before it.

    With `collect`, garbage is collected before, which touches every object.
    """
    if not _RESET.exists():
        pytest.skip("only Linux tells a process its peak memory")
    if collect:
        gc.collect()
    _RESET.write_text("5")
    before = _kibibytes("VmRSS")
    call()
    return 1024 * (_kibibytes("VmHWM") - before)


def _kibibytes(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", _STATUS.read_text())
    assert found is not None
    return int(found[1])
