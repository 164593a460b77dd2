"""Naming the rank that does not answer, when a collective of its peers runs out of time.

The ranks that waited sign the job's store; who has not signed some seconds later is the one that
hangs. For gloo: NCCL's own watchdog ends the processes that wait, with a report of its own.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from flame.errors import UserError
from flame.process.distributed import rank, world_size

ROLL_CALL_SECONDS = 3.0
"""Time in which all ranks that wait must have run out of time; they began to wait together."""


@contextmanager
def naming_silent_ranks(step: int) -> Iterator[None]:
    """Turn a timeout in a collective of step `step` into a `UserError` that names who is silent.

    Raises:
        UserError: instead of the `RuntimeError`; what else is raised inside passes.
    """
    begin = time.monotonic()
    try:
        yield
    except RuntimeError as error:
        if "Timed out" not in str(error):
            raise
        waited = time.monotonic() - begin
        silent = ", ".join(map(str, _absent(f"silence/{step}")))
        if not silent:
            raise
        raise UserError(
            f"rank {silent} hangs: no answer in step {step} for {waited:.0f} s "
            "(comm.train_timeout_seconds is the limit); the same command goes on from the last "
            "checkpoint"
        ) from error


def _absent(roll: str) -> list[int]:
    """The ranks that do not sign `roll` in time."""
    store = dist.distributed_c10d._get_default_store()
    store.set(f"{roll}/{rank()}", "here")
    time.sleep(ROLL_CALL_SECONDS)
    return [other for other in range(world_size()) if not store.check([f"{roll}/{other}"])]
