"""Items dealt to the ranks, in turn or in runs.

Dealt in turn, every rank has as many turns. FSDP2 gathers weights from all ranks in every forward
pass, so a rank that has run out of items must take part for as long as another has one. It gets an
item of another rank then, whose result it must not count.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from flame.process.distributed import rank, world_size

T = TypeVar("T")


@dataclass(frozen=True)
class Turn(Generic[T]):
    """What one rank does in one round."""

    first: int
    """Number of the round's first item, counted from 0."""
    item: T
    counts: bool
    """Whether the item is this rank's own; otherwise it runs for the sake of the other ranks."""

    @property
    def number(self) -> int:
        """Number of this rank's item in the round, if it has one."""
        return self.first + rank()


def turns(items: Iterable[T]) -> Iterator[Turn[T]]:
    """This rank's turns at `items`, of which rank r has those whose number is r modulo the ranks.

    Every rank must pass the same items and gets the same number of turns, in the order of the
    items. The items are read as they are needed, one round at a time.
    """
    first = 0
    for round_ in batched(items, world_size()):
        counts = rank() < len(round_)
        yield Turn(first, round_[rank() if counts else 0], counts)
        first += len(round_)


def share(items: Sequence[T], place: int, sharers: int) -> Sequence[T]:
    """The run of items that number `place` of `sharers` has: of n items, item i is number
    `i * sharers // n`'s.

    So of fewer items than sharers, each part of the sharers (a node's ranks) has its part.
    """
    begin, end = (-(-number * len(items) // sharers) for number in (place, place + 1))
    return items[begin:end]


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """`items` in lists of `size`, the last one as long as is left."""
    batch: list[T] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
