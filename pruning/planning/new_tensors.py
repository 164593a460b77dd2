"""Tensors that a plan makes anew, held in memory or made when they are written."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Later:
    """A tensor that is made or read when it is asked for, so that memory holds one at a time.

    Those of all layers together take as much as a large part of the model.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]
    """Returns the tensor; raises UserError if it cannot be made."""


NewTensors = Mapping[str, Tensor | Later]
"""By name."""


def made(tensor: Tensor | Later) -> Tensor:
    """The tensor itself."""
    return tensor.make() if isinstance(tensor, Later) else tensor
