"""What a process that writes a model alone, tensor by tensor, holds of it in memory."""

from collections.abc import Mapping

from flame.checkpoint.source import TensorInfo

BUFFER = 48 << 20
"""Bytes of file blocks and indexes beside the tensors."""


def held_by_streaming(infos: Mapping[str, TensorInfo]) -> int:
    """Return the most bytes held while a model's tensors are rewritten one by one.

    Four of the largest: read, stacked or sliced, and on its way to the disk (measured by
    `benchmarks.memory`).
    """
    return 4 * max(info.nbytes for info in infos.values()) + BUFFER


def say_streaming(infos: Mapping[str, TensorInfo], written: int) -> None:
    """Print how many bytes rank 0 is about to write of a model, and what it holds of them."""
    print(
        f"rank 0 alone writes {written / 1e9:,.1f} GB, tensor by tensor: in memory at most "
        f"{held_by_streaming(infos) / 2**20:,.0f} MiB of it",
        flush=True,
    )
