"""Processes that work on one thing together: an error of one is raised on all."""

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from flame.errors import UserError, first_line
from flame.process.distributed import from_rank_zero, gather_objects

T = TypeVar("T")

PIECE = 4 << 30
"""Bytes that a rank reads before it answers the others: in time at 10 MB/s and 10 minutes."""


class Peers:
    """The ranks of a process group (default: all), or this process by itself.

    It is by itself if `alone` is set or no process group was initialised. Methods are collective.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, alone: bool = False) -> None:
        self.alone = alone or not dist.is_initialized()
        self.group = None if self.alone else group
        self.is_first = self.alone or dist.get_rank(self.group) == 0

    def from_first(self, value: T) -> T:
        """Return the first rank's `value`, on every rank."""
        return value if self.alone else from_rank_zero(value, self.group)

    def agree(self, action: Callable[[], T]) -> T:
        """Run `action` on every rank; if it raises UserError on one, raise that on all."""
        result, complaint = _attempt(action)
        self._raise_any(complaint, *self._sums(complaint is not None))
        return result  # type: ignore[return-value]

    def go_through(self, parts: Iterator[int]) -> None:
        """Exhaust `parts` on every rank; if it raises UserError on one, raise that on all.

        The ranks meet after every `PIECE` bytes, so that none waits longer than the time of one for
        another that has more to read.

        Args:
            parts: does a part of the work before each item, which is the bytes that it took.
        """
        left = 1
        while left:
            more, complaint = _attempt(lambda: _piece(parts))
            failed, left = self._sums(complaint is not None, bool(more))
            self._raise_any(complaint, failed)

    def _sums(self, *flags: bool) -> list[int]:
        """Return on how many ranks each flag is set."""
        numbers = torch.tensor(flags, dtype=torch.int64)
        if not self.alone and dist.get_world_size(self.group) > 1:
            dist.all_reduce(numbers, group=self.group)
        return numbers.tolist()

    def _raise_any(self, complaint: str | None, failed: int) -> None:
        """Raise the first rank's complaint on all of them, if any `failed`."""
        if not failed:
            return
        complaints = [complaint] if self.alone else gather_objects(complaint, self.group)
        raise UserError(next(filter(None, complaints)))


def on_first(action: Callable[[], T]) -> T:
    """Run `action` on the first rank and return its result there, None on the others. Collective.

    All ranks wait for it; a UserError is raised on all of them.
    """
    peers = Peers()
    # Another rank may still be checking that the output of `action` does not exist.
    peers.agree(lambda: None)
    return peers.agree(lambda: action() if peers.is_first else None)  # type: ignore[return-value]


def raise_cause(error: CheckpointException, doing: str) -> None:
    """Raise the cause of DCP's collective exception.

    It is the first rank's UserError if there is one, else a UserError that says `doing` and the
    first OSError, else the exception itself.
    """
    causes = [error.failures[rank][0] for rank in sorted(error.failures)]
    for cause in causes:
        if isinstance(cause, UserError):
            raise UserError(str(cause)) from None
    for cause in causes:
        if isinstance(cause, OSError):
            raise UserError(f"{doing}: {cause.strerror or first_line(cause)}") from error
    raise error


def _piece(parts: Iterator[int]) -> bool:
    """Go on with `parts` for `PIECE` bytes; return whether something may be left."""
    done = 0
    for size in parts:
        done += size
        if done >= PIECE:
            return True
    return False


def _attempt(action: Callable[[], T]) -> tuple[T | None, str | None]:
    try:
        return action(), None
    except UserError as error:
        return None, str(error)
