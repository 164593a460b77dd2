"""What every source of tensors offers: tensors by name, read one at a time, whole or by rows.

Sources are a step folder (`dcp_source`), a Hugging Face folder (`safetensors_source`) and a LoRA
run (`flame.lora.source`). Reading rows (slices of dimension 0) lets a rank read only its own shard.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def promise(self) -> Tensor:
        """Return a meta-device tensor of this form: a promise that the content is read later."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


Read = Callable[[str], Tensor]
"""Returns a tensor by its name."""


class TensorSource(Protocol):
    """Named tensors on a disk."""

    def names(self) -> list[str]:
        """Return the names, sorted."""

    def info(self, name: str) -> TensorInfo:
        """Return shape and dtype of a tensor; raise `UserError` for an unknown name."""

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """Return a tensor, or its rows `start:stop`, as a new CPU tensor of the stored dtype.

        Raises `UserError` if the name is unknown or the file damaged, ValueError for wrong rows.
        """


def source_infos(source: TensorSource) -> dict[str, TensorInfo]:
    """Return shape and dtype of every tensor of a source, by name."""
    return {name: source.info(name) for name in source.names()}


def total_bytes(source: TensorSource) -> int:
    """Return the bytes that all tensors of `source` take."""
    return sum(source.info(name).nbytes for name in source.names())


def row_bounds(name: str, info: TensorInfo, rows: slice | None) -> tuple[int, int]:
    """Return begin and end of `rows` of the tensor `name`, 0 and 0 for a scalar.

    Raises ValueError if `rows` has a step, or the tensor is a scalar and has no rows.
    """
    if not info.shape:
        if rows is not None:
            raise ValueError(f"{name} is a scalar: it has no rows")
        return 0, 0
    start, stop, step = (rows or slice(None)).indices(info.shape[0])
    if step != 1:
        raise ValueError(f"rows of {name} must be contiguous, got a step of {step}")
    return start, max(start, stop)
