"""Products of weights with their gradients: what the loss is expected to lose with a channel."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float64, Int64
from torch import Tensor

from pruning.spaces import KINDS, Axis, Kind, Space
from pruning.statistics.interface import Source, Statistic


@dataclass(frozen=True)
class Shard:
    """Consecutive rows of a weight, and of the gradient of the whole calibration's loss by it."""

    weight: Tensor
    gradient: Tensor
    first_row: int = 0


@dataclass(frozen=True)
class GradientShare:
    """What one process holds of a space's projections."""

    space: Space
    shards: Mapping[str, Shard]
    """By the tensor's name; a tensor of which it holds nothing may be missing."""
    tokens: int
    """Tokens that this process has seen."""


@dataclass
class WeightGradientProducts(Statistic):
    """For each channel, the sum of |weight · gradient| over its entries in all projections.

    The gradient is that of the loss summed over all tokens, so the absolute value comes last: no
    sum over tokens can have it, and these sums are made once, at the end of a calibration, each
    process adding its rows.
    """

    source: ClassVar[Source] = Source.WEIGHT_GRADIENT
    kinds: ClassVar[tuple[Kind, ...]] = KINDS

    products: Float64[Tensor, "H d"]
    tokens: Int64[Tensor, ""]
    """Number of tokens whose loss the gradients are of."""

    def update(self, seen: GradientShare) -> None:
        """Add what one process holds."""
        for axis in projections(seen.space):
            if axis.fqn in seen.shards:
                at = _by_position(axis, seen.shards[axis.fqn])
                table = axis.layout.table().to(at.device)
                self.products += at[table].sum(-1).to(self.products.device)
        self.tokens += seen.tokens


def projections(space: Space) -> list[Axis]:
    """The axes of the projections of `space`."""
    return [axis for axis in space.axes if axis.role == "projection"]


def _by_position(axis: Axis, shard: Shard) -> Float64[Tensor, " n"]:
    """Sums of |weight · gradient| over all but the axis's dimension, by position along it."""
    products = (shard.weight.double() * shard.gradient.double()).abs()
    if axis.dim != 0:
        return products.movedim(axis.dim, 0).flatten(1).sum(1)
    at = products.new_zeros(axis.layout.size)
    at[shard.first_row : shard.first_row + len(products)] = products.flatten(1).sum(1)
    return at
