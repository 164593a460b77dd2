"""Sums of squares: of what enters the mixer, and of channels as the delta rule sees them."""

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from pruning.spaces import KINDS, Kind, Space
from pruning.statistics.interface import Source, Statistic, count, sums
from pruning.taps import OpCall


@dataclass
class InputSquares(Statistic):
    """The squares of each number that enters the mixer, summed over tokens; for all spaces."""

    source: ClassVar[Source] = Source.MIXER_INPUT
    kinds: ClassVar[tuple[Kind, ...]] = KINDS

    squares: Float64[Tensor, " hidden"]
    tokens: Int64[Tensor, ""]
    """Number of tokens summed."""

    @classmethod
    def zeros(cls, space: Space, hidden_size: int = 0, device: torch.device | str = "cpu") -> Self:
        """Zero sums."""
        return cls(squares=sums(hidden_size, device=device), tokens=count(device=device))

    def update(self, seen: Float[Tensor, "n hidden"]) -> None:
        """Add the hidden states of some tokens."""
        self.squares += seen.double().square().sum(0)
        self.tokens += len(seen)


@dataclass
class KeySquares(Statistic):
    """The squares of each key channel's q and k, at the delta-rule tap, summed over tokens."""

    source: ClassVar[Source] = Source.OP

    squares: Float64[Tensor, "H d"]
    terms: Int64[Tensor, ""]
    """Squares summed for each channel."""

    @classmethod
    def zeros(cls, space: Space, hidden_size: int = 0, device: torch.device | str = "cpu") -> Self:
        """Zero sums for the channels of `space`."""
        of_channels = sums(space.num_heads, space.head_dim, device=device)
        return cls(squares=of_channels, terms=count(device=device))

    def update(self, seen: OpCall) -> None:
        """Add the queries and keys of one delta-rule call."""
        for x in (seen.q, seen.k):
            self.squares += _squares(x)
            self.terms += x.shape[0] * x.shape[1]


@dataclass
class ValueSquares(Statistic):
    """The squares of each value channel's v in all heads, at the tap, summed over tokens."""

    source: ClassVar[Source] = Source.OP
    kinds: ClassVar[tuple[Kind, ...]] = ("value",)

    squares: Float64[Tensor, "1 d"]
    terms: Int64[Tensor, ""]
    """Squares summed for each channel: tokens times value heads."""

    @classmethod
    def zeros(cls, space: Space, hidden_size: int = 0, device: torch.device | str = "cpu") -> Self:
        """Zero sums for the channels of `space`."""
        return cls(squares=sums(1, space.head_dim, device=device), terms=count(device=device))

    def update(self, seen: OpCall) -> None:
        """Add the values of one delta-rule call."""
        self.squares += _squares(seen.v).sum(0, keepdim=True)
        self.terms += seen.v.shape[:3].numel()


def _squares(x: Float[Tensor, "B T H d"]) -> Float64[Tensor, "H d"]:
    return x.detach().double().square().sum((0, 1))
