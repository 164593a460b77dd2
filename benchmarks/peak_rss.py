"""The most memory that a process holds while it does something, as the system counts it."""

import ctypes
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

RETURNS_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "131072"}
"""Environment in which glibc gives freed tensors back to the system. Otherwise its threshold grows
to 32 MiB, tensors come from a heap whose freed pages stay resident, and small blocks that are made
and freed later touch them anew. To be set before a process starts, since blocks that lie free in
the heap are taken whatever the threshold."""
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass
class Grown:
    """What a block took."""

    bytes: int = 0
    """Most resident memory during the block, less that before it: mapped files count too."""
    read: int = 0
    """Bytes that read calls returned."""


@contextmanager
def peak_growth() -> Iterator[Grown]:
    """Measure the block in this process, on Linux; start it with `RETURNS_MEMORY`."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    grown, before, read = Grown(), _resident(), _bytes_read()
    try:
        yield grown
    finally:
        grown.read = _bytes_read() - read
        grown.bytes = max(0, _peak() - before)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE


def _peak() -> int:
    text = Path("/proc/self/status").read_text()
    return int(text.split("VmHWM:")[1].split()[0]) * 1024


def _bytes_read() -> int:
    text = Path("/proc/self/io").read_text()
    return int(text.split("rchar:")[1].split()[0])
