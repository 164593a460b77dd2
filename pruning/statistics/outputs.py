"""What the heads give: sums over the input of the output projection, after norm and gate."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float, Float64, Int64
from torch import Tensor

from pruning.spaces import HEAD_KINDS, Kind
from pruning.statistics.interface import Source, Statistic
from pruning.statistics.products import SumOfProducts


@dataclass
class OutputSquares(Statistic):
    """The squares of each number that enters the output projection, summed over tokens."""

    source: ClassVar[Source] = Source.OUTPUT
    kinds: ClassVar[tuple[Kind, ...]] = ("value", "head", "value-head")

    squares: Float64[Tensor, " out"]
    tokens: Int64[Tensor, ""]
    """Number of tokens summed."""

    def update(self, seen: Float[Tensor, "n out"]) -> None:
        """Add the outputs of all heads for some tokens."""
        self.squares += seen.double().square().sum(0)
        self.tokens += len(seen)


@dataclass
class HeadOutputGram(SumOfProducts, Statistic):
    """For each head, group of heads or value head, the Gram matrix of its outputs: Σ z zᵀ.

    z is what it hands to the output projection.
    """

    source: ClassVar[Source] = Source.OUTPUT
    kinds: ClassVar[tuple[Kind, ...]] = HEAD_KINDS

    gram: Float64[Tensor, "H d block block"]
    tokens: Int64[Tensor, ""]
    """Number of tokens summed."""

    def update(self, seen: Float[Tensor, "n out"]) -> None:
        """Add some tokens; cost 2 tokens out block."""
        of_heads = self.gram.flatten(0, 1)
        self.add_products_(of_heads, seen.unflatten(-1, of_heads.shape[:2])[None])
        self.tokens += len(seen)
