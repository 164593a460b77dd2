"""The batches of one step, or one error on all ranks."""

import time
from dataclasses import dataclass
from typing import Any

import torch

from flame.data.packing import IGNORE_INDEX, Batch
from flame.errors import UserError
from flame.process.distributed import gather_objects, summed


class DataError(UserError):
    """A rank cannot read its data. All ranks raise it at the same step, before it trains."""


class DataEndError(Exception):
    """A rank has too little data for the step. All ranks raise it at the same step."""


class StopRequestedError(Exception):
    """A rank was asked to stop. All ranks raise it between the same two steps."""


@dataclass(frozen=True)
class StepBatches:
    """What this rank trains on in one step."""

    batches: list[Batch]
    tokens: int
    """That the batches predict."""
    all_tokens: int
    """That the batches of all ranks predict."""
    seconds: float
    """That this rank waited for them."""


def take_batches(loader: Any, count: int, stop: bool = False) -> StepBatches:
    """Return the next `count` batches of `loader`. Collective.

    While a GPU works on the step before, this neither waits for it nor gives it work: the one
    all-reduce runs on the CPU. If anything is raised the loader stands where it stood.

    Args:
        loader: this rank's `PackedLoader`.
        stop: whether this rank was asked to stop.

    Raises:
        StopRequestedError: a rank was.
        DataEndError: a rank has fewer batches.
        DataError: a rank cannot read its data; the message is that of the first such rank.
    """
    begin, position, failure = time.perf_counter(), loader.position, ""
    taken: list[Batch] = []
    try:
        while len(taken) < count and not stop and (batch := next(loader, None)) is not None:
            taken.append(batch)
    except UserError as error:
        failure = str(error)
    seconds = time.perf_counter() - begin
    tokens = sum(int((labels != IGNORE_INDEX).sum()) for _, labels in taken)
    missing = len(taken) < count
    total, stopped, failed, ended = summed(
        torch.tensor([tokens, stop, bool(failure), missing], dtype=torch.int64)
    )
    if ended:
        loader.rewind(position)
        if stopped:
            raise StopRequestedError
        if failed:
            raise DataError(next(filter(None, gather_objects(failure))))
        raise DataEndError
    return StepBatches(taken, tokens, int(total), seconds)
