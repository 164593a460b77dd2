"""Sums of squares: of what enters the mixer, and of channels as the delta rule sees them."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float, Float64, Int64
from torch import Tensor

from pruning.op_call import OpCall
from pruning.spaces import Kind
from pruning.statistics.interface import Source, Statistic


@dataclass
class InputSquares(Statistic):
    """The squares of each number that enters the mixer, summed over tokens."""

    source: ClassVar[Source] = Source.MIXER_INPUT

    squares: Float64[Tensor, " hidden"]
    tokens: Int64[Tensor, ""]
    """Number of tokens summed."""

    def update(self, seen: Float[Tensor, "n hidden"]) -> None:
        """Add the hidden states of some tokens."""
        self.squares += seen.double().square().sum(0)
        self.tokens += len(seen)


@dataclass
class KeySquares(Statistic):
    """The sum over tokens of q² + k² for each key channel, at the delta-rule tap.

    q and k count alike, in one sum; they are taken after convolution and activation, before their
    norm. `terms` counts the squares summed for each channel, two a token.
    """

    source: ClassVar[Source] = Source.OP

    squares: Float64[Tensor, "H d"]
    terms: Int64[Tensor, ""]
    """Squares summed for each channel."""

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

    squares: Float64[Tensor, "H d"]
    """A value space has one row of channels, which all its heads share."""
    terms: Int64[Tensor, ""]
    """Squares summed for each channel: tokens times value heads."""

    def update(self, seen: OpCall) -> None:
        """Add the values of one delta-rule call."""
        self.squares += _squares(seen.v).sum(0, keepdim=True)
        self.terms += seen.v.shape[:3].numel()


def _squares(x: Float[Tensor, "B T H d"]) -> Float64[Tensor, "H d"]:
    return x.detach().double().square().sum((0, 1))
