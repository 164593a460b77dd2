"""Naming the rank that hangs when a collective times out on the others.

The ranks that waited write their numbers to the job's store; a rank that has not written some
seconds later is the one that hangs. This is for gloo: NCCL's own watchdog ends the waiting
processes with its own report.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from flame.errors import UserError
from flame.process.distributed import rank, world_size

ROLL_CALL_SECONDS = 3.0
"""Time within which all waiting ranks time out, since they began to wait together."""


@contextmanager
def naming_hung_ranks(step: int) -> Iterator[None]:
    """Turn the block's timeout in a collective into a UserError that names the hanging ranks.

    Other errors pass, and so does a timeout for which no rank is missing.
    """
    begin = time.monotonic()
    try:
        yield
    except RuntimeError as error:
        if "Timed out" not in str(error):
            raise
        waited = time.monotonic() - begin
        hung = ", ".join(map(str, _absent(f"timeout/{step}")))
        if not hung:
            raise
        raise UserError(
            f"rank {hung} hangs: no answer in step {step} for {waited:.0f} s "
            "(comm.train_timeout_seconds is the limit); the same command goes on from the last "
            "checkpoint"
        ) from error


def _absent(roll: str) -> list[int]:
    """Write this rank's number under `roll` in the store; return the ranks that did not in time."""
    store = dist.distributed_c10d._get_default_store()
    store.set(f"{roll}/{rank()}", "here")
    time.sleep(ROLL_CALL_SECONDS)
    return [other for other in range(world_size()) if not store.check([f"{roll}/{other}"])]
