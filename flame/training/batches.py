"""The batches of one step, or one error on all ranks."""

from collections.abc import Iterator
from typing import Any

import torch

from flame.data.packing import IGNORE_INDEX
from flame.errors import UserError
from flame.process.distributed import gather_objects, summed


class DataError(UserError):
    """A rank cannot read its data. All ranks raise it at the same step, before it trains."""


def take_batches(loader: Any, batches: Iterator[Any], count: int) -> tuple[list[Any], int, int]:
    """Return the next `count` batches, with the tokens that they predict here and on all ranks.

    Collective.

    Args:
        loader: the `PackedLoader` behind `batches`, which comes back to where it stood if a rank
            fails.
        batches: an iterator over it.
        count: batches of a step.

    Raises:
        DataError: a rank cannot read its data; the message is that of the first such rank.
    """
    begin, taken, failure = loader.position, [], ""
    try:
        taken = [next(batches) for _ in range(count)]
    except UserError as error:
        failure = str(error)
    tokens = sum(int((labels != IGNORE_INDEX).sum()) for _, labels in taken)
    # The sum runs on the CPU, so that nothing waits for a GPU at work on the last step.
    total, failed = summed(torch.tensor([tokens, bool(failure)]))
    if failed:
        loader.rewind(begin)
        raise DataError(next(filter(None, gather_objects(failure))))
    return taken, tokens, int(total)
