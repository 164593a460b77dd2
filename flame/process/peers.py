"""The processes that save or load together, and one fate for all of them."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from flame.errors import UserError, first_line

T = TypeVar("T")


class Peers:
    """A process group, or one process by itself (`alone`, or no group was initialised)."""

    def __init__(self, group: dist.ProcessGroup | None = None, alone: bool = False) -> None:
        self.alone = alone or not (dist.is_available() and dist.is_initialized())
        self.group = None if self.alone else group
        self.is_first = self.alone or dist.get_rank(self.group) == 0

    def from_first(self, value: T) -> T:
        """The first rank's `value`, on every rank."""
        if self.alone:
            return value
        source = 0 if self.group is None else dist.get_global_rank(self.group, 0)
        values = [value]
        dist.broadcast_object_list(values, src=source, group=self.group)
        return values[0]

    def agree(self, action: Callable[[], T]) -> T:
        """Run `action` on every rank; a `UserError` of any rank is raised on all of them."""
        result, complaint = _attempt(action)
        complaints: list[Any] = [complaint]
        if not self.alone:
            complaints = [None] * dist.get_world_size(self.group)
            dist.all_gather_object(complaints, complaint, group=self.group)
        for text in complaints:
            if text is not None:
                raise UserError(text)
        return result  # type: ignore[return-value]


def on_first(action: Callable[[], T]) -> T:
    """The first rank's result of `action`; other ranks wait, and get None. Collective.

    A `UserError` is raised on every rank.
    """
    peers = Peers()
    # Another rank may still be checking that the output, which the first will write, is free.
    peers.agree(lambda: None)
    return peers.agree(lambda: action() if peers.is_first else None)  # type: ignore[return-value]


def raise_cause(error: CheckpointException, doing: str) -> None:
    """Raise what lies behind DCP's collective exception: a `UserError`, or one for an OSError."""
    causes = [error.failures[rank][0] for rank in sorted(error.failures)]
    for cause in causes:
        if isinstance(cause, UserError):
            raise UserError(str(cause)) from None
    for cause in causes:
        if isinstance(cause, OSError):
            raise UserError(f"{doing}: {cause.strerror or first_line(cause)}") from error
    raise error


def _attempt(action: Callable[[], T]) -> tuple[T | None, str | None]:
    try:
        return action(), None
    except UserError as error:
        return None, str(error)
