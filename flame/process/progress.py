"""Progress bars for loops that may take longer than two seconds."""

import os
import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def progress(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Yield `items`; rank 0 shows a bar on stderr once two seconds have passed."""
    from tqdm import tqdm

    quiet = int(os.environ.get("RANK", "0")) > 0 or not sys.stderr.isatty()
    bar = tqdm(items, desc=description, total=total, delay=2, disable=quiet, leave=False)
    yield from bar
