"""Sets of documents, dealt out to virtual shards.

Document i of an epoch's order belongs to virtual shard i mod V. The order of a set that can be
indexed is a permutation, drawn anew for each epoch. A stream keeps its own order. Streams of files
are dealt out in blocks (`flame.data.files.dealt`); others, of the `datasets` library, are read
whole by each shard, unless their files can be dealt out evenly.
"""

import logging
import pickle
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from flame.data.files.bad_rows import BadRows
from flame.errors import UserError, first_line

READ_CHUNK = 64
"""Documents fetched at once."""


class Documents(Protocol):
    @property
    def name(self) -> str:
        """The set's name in error messages."""

    @property
    def size(self) -> int | None:
        """Number of documents; None for a stream."""

    def shard(self, shard: int, num_shards: int, epoch: int, start: int) -> Iterator[str]:
        """Yield the texts of a virtual shard in the order of an epoch, from its `start`-th on."""


@dataclass
class IndexedDocuments:
    """A set of known size."""

    name: str
    size: int
    take: Callable[[list[int]], list[str]]
    """Returns the texts of the documents with these numbers."""

    shuffle: bool
    """Permute the documents in each epoch."""

    seed: int
    """Seed of the permutations."""

    def shard(self, shard: int, num_shards: int, epoch: int, start: int) -> Iterator[str]:
        order = self.order(epoch)[shard::num_shards][start:].copy()
        for first in range(0, len(order), READ_CHUNK):
            yield from self.take(order[first : first + READ_CHUNK].tolist())

    def order(self, epoch: int) -> NDArray[np.int64]:
        """Return the permutation `[size]` of an epoch; it depends on size, seed and epoch alone."""
        if not self.shuffle:
            return np.arange(self.size)
        # RandomState: its stream is the same in every version of numpy, and a run may resume later.
        bits = np.random.MT19937(np.random.SeedSequence([self.seed, epoch]))
        return np.random.RandomState(bits).permutation(self.size)


@dataclass
class StreamedDocuments:
    """A set that is read from front to back."""

    name: str
    rows: Any
    """A streaming data set of the `datasets` library."""

    text_key: str
    """The column that holds the text."""

    bad_rows: BadRows
    limit: int = 0
    """Read only this many documents; 0 reads all."""

    size: None = None

    def __post_init__(self) -> None:
        # The library keeps a stream's position in the set itself: two iterators over one set, as
        # two shards or two loaders have them, skip each other's documents. So each gets its own.
        self._pristine = pickle.dumps(self.rows)

    def shard(self, shard: int, num_shards: int, epoch: int, start: int) -> Iterator[str]:
        rows = self._rows(shard, num_shards, start)
        while chunk := self._read(rows):
            yield from chunk

    def _read(self, rows: Iterator[dict[str, Any]]) -> list[str]:
        with reading(self.name):
            return [self._text(row) for row in islice(rows, READ_CHUNK)]

    def _text(self, row: dict[str, Any]) -> str:
        check_column(self.name, self.text_key, row)
        return self.bad_rows.text(row[self.text_key])

    def _rows(self, shard: int, num_shards: int, start: int) -> Iterator[dict[str, Any]]:
        rows = pickle.loads(self._pristine)
        if self.limit == 0 and rows.num_shards % num_shards == 0:
            return iter(rows.shard(num_shards, shard).skip(start))
        first = shard + start * num_shards
        stop = max(self.limit - first, 0) if self.limit else None
        return islice(rows.skip(first), 0, stop, num_shards)


def check_column(name: str, text_key: str, columns: Iterable[str]) -> None:
    """Raise `UserError` unless the set called `name` has a column `text_key`."""
    if text_key not in columns:
        raise UserError(
            f"{name} has no column {text_key!r}: set data.text_key to one of {', '.join(columns)}"
        )


def no_documents(name: str) -> UserError:
    """Return the error for an empty set."""
    return UserError(f"{name} has no documents: give data.dataset another file, folder or split")


@contextmanager
def reading(name: str) -> Iterator[Any]:
    """Give the `datasets` library to the block, without its progress bars and warnings.

    Raises:
        UserError: the library cannot read the set called `name`.
    """
    import datasets
    from datasets.exceptions import DatasetsError

    bars, level = not datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)
    try:
        yield datasets
    except (DatasetsError, OSError, ValueError) as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise UserError(f"cannot read {name}: {first_line(error.__cause__ or error)}") from error
    except StopIteration as error:
        # The JSON reader ends so on a file without a single record.
        raise no_documents(name) from error
    finally:
        datasets.logging.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()
