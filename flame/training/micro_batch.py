"""How many sequences a process takes at a time."""

from dataclasses import replace
from typing import Any


def micro_batch(job: Any, world_size: int) -> int:
    """Return the most sequences, up to `training.local_batch_size`, that divide a process's share.

    A process's share of a step is `training.global_batch_size` over `world_size`. So one recipe
    trains on the same tokens on any number of processes that divides its batch.
    """
    training = job.training
    share = training.global_batch_size // world_size
    most = min(training.local_batch_size, share)
    return max(size for size in range(1, most + 1) if share % size == 0)


def with_micro_batch(job: Any, world_size: int) -> Any:
    """Return `job` with `training.local_batch_size` as `world_size` processes take it."""
    training = replace(job.training, local_batch_size=micro_batch(job, world_size))
    return replace(job, training=training)
