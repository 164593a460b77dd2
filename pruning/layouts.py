"""Layouts: at which positions along one dimension of a tensor the channels of a space lie."""

from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Int64
from torch import Tensor


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
class SharedHeads:
    """Channel c lies at c in every one of `copies` heads: value channels, which share a norm."""

    copies: int
    head_dim: int

    @property
    def size(self) -> int:
        """copies * head_dim."""
        return self.copies * self.head_dim

    def table(self) -> Int64[Tensor, "1 d m"]:
        """A position in each head."""
        return torch.arange(self.size).view(1, self.copies, self.head_dim).transpose(1, 2)


@dataclass(frozen=True)
class Blocks:
    """Channel c is the c-th of `count` blocks of `length` positions: a whole head."""

    count: int
    length: int

    @property
    def size(self) -> int:
        """count * length."""
        return self.count * self.length

    def table(self) -> Int64[Tensor, "1 d m"]:
        """The positions of each block."""
        return torch.arange(self.size).view(1, self.count, self.length)


@dataclass(frozen=True)
class GroupedBlocks:
    """Channel c of head h is block h * group + c of `length` positions: a value head of a group."""

    num_heads: int
    group: int
    length: int

    @property
    def size(self) -> int:
        """num_heads * group * length."""
        return self.num_heads * self.group * self.length

    def table(self) -> Int64[Tensor, "H d m"]:
        """The positions of each block."""
        return torch.arange(self.size).view(self.num_heads, self.group, self.length)


@dataclass(frozen=True)
class Strided:
    """A part of a dimension: copy m of channel c of head h lies at `offset` plus
    h * strides[0] + c * strides[1] + m * strides[2]."""

    size: int
    """Length of the whole dimension."""
    counts: tuple[int, int, int]
    """Heads, channels of each, positions of each channel."""
    strides: tuple[int, int, int]
    offset: int = 0

    def table(self) -> Int64[Tensor, "H d m"]:
        """The positions, by head, channel and copy."""
        h, c, m = (
            torch.arange(n) * step for n, step in zip(self.counts, self.strides, strict=True)
        )
        return self.offset + h[:, None, None] + c[:, None] + m


@dataclass(frozen=True)
class Joined:
    """Channels with positions in several parts of one dimension: the rows of a fused projection."""

    parts: tuple[Layout, ...]

    @property
    def size(self) -> int:
        """Length of the dimension."""
        return self.parts[0].size

    def table(self) -> Int64[Tensor, "H d m"]:
        """A channel's positions in each part, one part after another."""
        return torch.cat([part.table() for part in self.parts], -1)
