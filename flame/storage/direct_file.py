"""Writing large files past the page cache: one block goes to the disk while the next is filled.

A checkpoint is not read soon after it is written. Through the page cache it would cost an extra
copy, and push out pages that are needed. A file system that refuses direct writes gets the blocks
through the cache.
"""

import errno
import fcntl
import mmap
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

BLOCK = 8 << 20
"""Bytes that are written at a time; two blocks are in memory."""

_DIRECT = getattr(os, "O_DIRECT", 0)


class DirectFile:
    """A new file that is written in order and closed by `finish`, or by `close` to give it up.

    A thread writes full blocks, so an error of the disk is raised by a later call, at the latest
    by `finish`.
    """

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        self._descriptor = os.open(path, flags, 0o666)
        self._blocks: list[mmap.mmap] = []
        self._pending: list[Future[None] | None] = [None, None]
        self._current, self._filled = 0, 0
        self._worker: ThreadPoolExecutor | None = None
        self._written = 0
        """Bytes of the blocks that were handed to the thread."""

    def tell(self) -> int:
        return self._written + self._filled

    def write(self, data: memoryview) -> None:
        """Append `data`, a view of bytes."""
        while len(data):
            if self._filled == BLOCK:
                self._hand_over()
            taken = min(len(data), BLOCK - self._filled)
            self._block()[self._filled : self._filled + taken] = data[:taken]
            self._filled += taken
            data = data[taken:]

    def finish(self) -> None:
        """Write what is left, wait until everything is on the disk, and close the file."""
        try:
            self._wait()
            self._set_direct(False)
            if self._filled:
                _write_all(self._descriptor, memoryview(self._block())[: self._filled])
            os.fsync(self._descriptor)
        finally:
            self.close()

    def close(self) -> None:
        """Close the file as it is; calling it again does nothing."""
        if self._worker is not None:
            self._worker.shutdown(wait=True)
            self._worker = None
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _block(self) -> mmap.mmap:
        while len(self._blocks) <= self._current:
            # mmap gives memory that is aligned to pages, as direct writes need.
            self._blocks.append(mmap.mmap(-1, BLOCK))
        return self._blocks[self._current]

    def _hand_over(self) -> None:
        """Give the full block to the thread, and wait until the other block may be filled."""
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, "write")
            self._set_direct(True)
        block = self._block()
        self._pending[self._current] = self._worker.submit(self._write_block, block)
        self._written += BLOCK
        self._current, self._filled = 1 - self._current, 0
        free = self._pending[self._current]
        if free is not None:
            free.result()

    def _wait(self) -> None:
        for pending in (self._pending[self._current], self._pending[1 - self._current]):
            if pending is not None:
                pending.result()

    def _write_block(self, block: Any) -> None:
        try:
            _write_all(self._descriptor, memoryview(block))
        except OSError as error:
            if not self._is_direct() or error.errno != errno.EINVAL:
                raise
            self._set_direct(False)
            _write_all(self._descriptor, memoryview(block))

    def _set_direct(self, wanted: bool) -> None:
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        try:
            changed = flags | _DIRECT if wanted else flags & ~_DIRECT
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, changed)
        except OSError:
            return

    def _is_direct(self) -> bool:
        return bool(fcntl.fcntl(self._descriptor, fcntl.F_GETFL) & _DIRECT)


def _write_all(descriptor: int, data: memoryview) -> None:
    while len(data):
        data = data[os.write(descriptor, data) :]
