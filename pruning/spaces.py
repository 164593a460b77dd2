"""Spaces: sets of channels that can only be kept or dropped together.

A space is a grid of `num_heads` x `head_dim` channels with the list of tensor axes that it indexes.
Each axis says through a layout where a channel lies along the tensor's dimension, so that one
selection `kept` of shape [num_heads, k] slices every tensor of the space consistently.

The three kinds use the grid so:

- key: one row per key head; q and k of a head share the row's selection.
- value: one row for the whole layer, because the output norm's weight is shared by all heads; a
  channel then lies at one position in every head.
- head: one row whose channels are whole key-head groups; a channel is a block of positions.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from jaxtyping import Int64
from torch import Tensor

Kind = Literal["key", "value", "head"]
Role = Literal["projection", "convolution", "vector"]


class Layout(Protocol):
    """Where the channels of a space lie along one dimension of a tensor.

    A layout may leave positions out (rows of an interleaved projection that belong to other
    spaces): these always survive.
    """

    @property
    def size(self) -> int:
        """Length of the tensor's dimension before pruning."""
        ...

    def table(self) -> Int64[Tensor, "H d m"]:
        """The m positions of each channel of each head; no position occurs twice."""
        ...


@dataclass(frozen=True)
class HeadMajor:
    """Channel c of head h lies at h * head_dim + c: the rows of a plain q, k or v projection."""

    num_heads: int
    head_dim: int

    @property
    def size(self) -> int:
        """num_heads * head_dim."""
        return self.num_heads * self.head_dim

    def table(self) -> Int64[Tensor, "H d 1"]:
        """One position per channel."""
        return torch.arange(self.size).view(self.num_heads, self.head_dim, 1)


@dataclass(frozen=True)
class Axis:
    """One dimension of one tensor that a space indexes; the tensor is sliced along it."""

    fqn: str
    """The tensor's name in the state dict of the model."""
    dim: int
    """The dimension that is sliced."""
    layout: Layout
    """How channels map to positions along `dim`."""
    role: Role = "projection"
    """What the tensor is: methods that score weights look at projections only."""


@dataclass(frozen=True)
class Space:
    """`num_heads` x `head_dim` channels of one layer that are kept or dropped together."""

    name: str
    """Unique in the model, such as `layers.3.key`."""
    kind: Kind
    layer: int
    """Index of the decoder layer, counted from 0."""
    num_heads: int
    head_dim: int
    axes: tuple[Axis, ...]

    @property
    def noun(self) -> str:
        """The channels in words, for messages."""
        return "heads" if self.kind == "head" else f"{self.kind} channels"


def positions(axis: Axis, kept: Int64[Tensor, "H k"]) -> Int64[Tensor, " n"]:
    """Positions along the axis that survive when `kept` survives, in increasing order.

    Args:
        axis: the axis to slice.
        kept: the channels to keep, per head.

    Returns:
        Indices for `index_select` along `axis.dim`; positions outside the space are among them.
    """
    survives = torch.ones(axis.layout.size, dtype=torch.bool)
    survives[dropped_positions(axis, kept)] = False
    return survives.nonzero().squeeze(-1)


def dropped_positions(axis: Axis, kept: Int64[Tensor, "H k"]) -> Int64[Tensor, " n"]:
    """Positions along the axis that go when only `kept` survives, in increasing order."""
    table = axis.layout.table()
    dropped = torch.ones(table.shape[:2], dtype=torch.bool)
    dropped.scatter_(1, kept.cpu(), False)
    return table[dropped].flatten().sort().values


def check_kept(space: Space, kept: Tensor) -> None:
    """Raise ValueError unless `kept` is a selection for `space`.

    A selection is int64 of shape [num_heads, k] with 1 <= k <= head_dim, each row strictly
    increasing within [0, head_dim).
    """
    if kept.dtype != torch.int64 or kept.ndim != 2 or kept.shape[0] != space.num_heads:
        raise ValueError(
            f"{space.name}: kept channels are {kept.dtype} of shape {list(kept.shape)}, "
            f"expected int64 of shape [{space.num_heads}, k]"
        )
    check_count(kept.shape[1], space.head_dim, f"{space.noun} of {space.name}")
    if int(kept.min()) < 0 or int(kept.max()) >= space.head_dim:
        raise ValueError(
            f"{space.name}: kept channels {int(kept.min())}..{int(kept.max())} leave the range "
            f"0..{space.head_dim - 1}"
        )
    if kept.shape[1] > 1 and int(kept.diff(dim=1).min()) <= 0:
        raise ValueError(f"{space.name}: kept channels must be strictly increasing in each head")


def check_count(k: int, available: int, what: str = "channels") -> None:
    """Raise ValueError unless 1 <= k <= available."""
    if not 1 <= k <= available:
        raise ValueError(
            f"cannot keep {k} of {available} {what}: choose a number from 1 to {available}"
        )
