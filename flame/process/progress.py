"""Telling a person what a command is doing: phases, and loops that may take longer than seconds.

On a terminal, rank 0 names a phase on stderr when it begins and shows a bar for a loop. Elsewhere,
in a scheduler's log, it writes a line on stdout every half minute for what still goes on then.
"""

import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")

LINE_SECONDS = 30.0
"""Seconds between lines where there is no terminal."""


@contextmanager
def phase(description: str) -> Iterator[None]:
    """Say what the block does, such as `importing torch`."""
    if _is_quiet():
        yield
    elif sys.stderr.isatty():
        print(f"{description} …", file=sys.stderr, flush=True)
        yield
    else:
        with _reported(_Doing(description)):
            yield


def progress(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Yield `items`, and show how many of `total` are done; on a terminal after two seconds.

    Args:
        items: what to go through.
        description: what is done with them, in a word or two.
        total: their number, where `items` has no length.
    """
    if not _is_quiet() and not sys.stderr.isatty():
        yield from _counted(items, description, total)
        return
    from tqdm import tqdm

    bar = tqdm(items, desc=description, total=total, delay=2, disable=_is_quiet(), leave=False)
    yield from bar


class _Doing:
    """What goes on, since when, and how much of it is done."""

    def __init__(self, description: str, total: int | None = None) -> None:
        self.description, self.total = description, total
        self.done = 0
        self.begun = time.monotonic()

    def line(self) -> str:
        seconds = round(time.monotonic() - self.begun)
        parts = f" {self.done}/{self.total}" if self.total else f" {self.done}" * (self.done > 0)
        return f"{self.description}{parts}, {seconds // 60}:{seconds % 60:02} so far"


def _counted(items: Iterable[T], description: str, total: int | None) -> Iterator[T]:
    doing = _Doing(description, total or (len(items) if isinstance(items, Sized) else None))
    with _reported(doing):
        for item in items:
            yield item
            doing.done += 1


@contextmanager
def _reported(doing: _Doing) -> Iterator[None]:
    """Write a line about `doing` every `LINE_SECONDS` inside the block, among the log's lines."""
    over = threading.Event()

    def report() -> None:
        while not over.wait(LINE_SECONDS):
            print(doing.line(), flush=True)

    threading.Thread(target=report, daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _is_quiet() -> bool:
    return int(os.environ.get("RANK", "0")) > 0
