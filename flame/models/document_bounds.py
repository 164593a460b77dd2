"""Boundaries of packed documents, which the host knows before a device has them.

fla's kernels run over the chunks of documents, whose number the host must know to launch them. fla
reads it from the boundaries, and if these lie on a device, the host waits until that has done all
its work. So whoever moves boundaries to a device lets them remember where they came from, and fla
counts there.
"""

import inspect
from typing import Any

import torch
from torch import Tensor

ATTRIBUTE = "on_host"
"""Of boundaries on a device: the same on the host."""

INDICES = ("prepare_chunk_indices", "prepare_position_ids")
"""Functions of `fla.ops.utils.index` that read boundaries on the host."""


def remember(moved: Any, value: Any) -> Any:
    """Return `moved`, which is a copy of `value` on another device and remembers it."""
    if moved is not value:
        setattr(moved, ATTRIBUTE, value)
    return moved


def on_host(bounds: Tensor) -> Tensor:
    """Return `bounds` on the host if they remember that, else themselves."""
    return getattr(bounds, ATTRIBUTE, bounds)


def count_on_host() -> None:
    """Make fla index the documents on the host wherever their boundaries remember that."""
    from fla.ops.utils import index

    for name in INDICES:
        cached = getattr(index, name)
        compute = inspect.unwrap(cached)
        # Other modules hold the caching function itself, so what it calls is replaced.
        for cell in cached.__closure__:
            if cell.cell_contents is compute:
                cell.cell_contents = _counting(compute)


def _counting(compute: Any) -> Any:
    def indices(cu_seqlens: Tensor, *args: Any, **options: Any) -> Tensor:
        bounds = on_host(cu_seqlens)
        found = compute(bounds, *args, **options)
        if bounds is cu_seqlens:
            return found
        if torch.cuda.is_available():
            found = found.pin_memory()
        return found.to(cu_seqlens.device, non_blocking=True)

    return indices
