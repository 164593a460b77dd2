"""Blocks of files dealt out to virtual shards, for sets that are read from front to back.

The blocks go, in the order of the files, each to the shard that has least so far. So every byte is
read by one shard, and what a shard reads does not depend on the number of processes. A position is
a block and a row in it, and to go on there nothing before that block is read.
"""

import hashlib
import heapq
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from os.path import commonpath
from pathlib import Path

from flame.data.files.bad_rows import BadRows
from flame.data.files.blocks import Block

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Share:
    """Every `step`-th row of a block, from the `first`-th on."""

    block: Block
    first: int = 0
    step: int = 1
    limit: int | None = None
    """How many rows of the block count at all; None for all."""


@dataclass
class DealtDocuments:
    """Documents in blocks of files."""

    name: str
    blocks: Sequence[Block]
    text_key: str
    """The column that holds the text."""

    bad_rows: BadRows
    limit: int = 0
    """Read only this many documents, counted over all blocks; 0 reads all."""

    size: None = None
    _dealt: dict[int, list[list[Share]]] = field(default_factory=dict, repr=False)

    @cached_property
    def layout(self) -> str:
        """A hash of the blocks: their files' names, below a common folder, places and weights."""
        places = [(*block.place, block.weight) for block in self.blocks]
        root = commonpath([str(Path(file).parent) for file, _, _ in places])
        lines = [f"{file.removeprefix(root)} {at} {weight}" for file, at, weight in places]
        text = "\n".join([*lines, str(self.limit)])
        return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16]

    def num_blocks(self, shard: int, num_shards: int) -> int:
        """Return how many blocks a virtual shard has."""
        return len(self._shares(num_shards)[shard])

    def block(self, shard: int, num_shards: int, number: int, start: int) -> Iterator[str]:
        """Yield the documents of a shard's `number`-th block, from its `start`-th on.

        Raises:
            UserError: a file cannot be read, or too many of its rows are no text.
        """
        share = self._shares(num_shards)[shard][number]
        first = share.first + start * share.step
        stop = None if share.limit is None else max(share.limit - first, 0)
        rows = islice(share.block.cells(self.text_key, first), 0, stop, share.step)
        for row, cell in enumerate(rows, start):
            yield self.bad_rows.text(cell, (share.block.place, share.first + row * share.step))

    def shard(self, shard: int, num_shards: int, epoch: int, start: int) -> Iterator[str]:
        """Yield the documents of a virtual shard from its `start`-th on, read from the first."""
        numbers = range(self.num_blocks(shard, num_shards))
        texts = (t for number in numbers for t in self.block(shard, num_shards, number, 0))
        yield from islice(texts, start, None)
        self.bad_rows.finish()

    def _shares(self, num_shards: int) -> list[list[Share]]:
        if num_shards not in self._dealt:
            self._dealt[num_shards] = deal(self._limited(), num_shards)
            self._warn(num_shards)
        return self._dealt[num_shards]

    def _limited(self) -> list[Share]:
        """Return the blocks that hold the first `limit` documents."""
        if self.limit == 0:
            return [Share(block) for block in self.blocks]
        shares, left = [], self.limit
        for block in self.blocks:
            rows = block.rows
            if rows is None:
                rows = sum(1 for _ in islice(block.cells(self.text_key, 0), left))
            rows = min(rows, left)
            if rows:
                shares.append(Share(block, limit=rows))
            left -= rows
            if left == 0:
                break
        return shares

    def _warn(self, num_shards: int) -> None:
        blocks = len({share.block.place for own in self._dealt[num_shards] for share in own})
        if blocks < num_shards and num_shards > 1:
            times = -(-num_shards // max(blocks, 1))
            text = "%s: %d parts for %d virtual shards: each part is read about %d times"
            log.info(text, self.name, blocks, num_shards, times)


def deal(shares: Sequence[Share], num_shards: int) -> list[list[Share]]:
    """Return the shares of each of `num_shards` virtual shards.

    Where there are fewer blocks than shards, each block is split by rows among several shards,
    all of which read it.
    """
    parts = -(-num_shards // max(len(shares), 1))
    if parts > 1:
        shares = [Share(s.block, n, parts, s.limit) for s in shares for n in range(parts)]
    least = [(0, shard) for shard in range(num_shards)]
    dealt: list[list[Share]] = [[] for _ in range(num_shards)]
    for share in shares:
        weight, shard = heapq.heappop(least)
        dealt[shard].append(share)
        heapq.heappush(least, (weight + max(share.block.weight // share.step, 1), shard))
    return dealt
