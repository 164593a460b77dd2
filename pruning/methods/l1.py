"""L1: keep the channels whose projection rows have the largest absolute sums."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from pruning.methods.interface import Statistics, Weights, top_channels
from pruning.spaces import KINDS, Axis, Kind, Space
from pruning.statistics import Statistic


@dataclass(frozen=True)
class L1:
    """Score of a channel: the sum of |W_q| + |W_k| over its rows (arXiv 2602.04852).

    Convolutions do not count. No data is read.
    """

    name: ClassVar[str] = "l1"
    kinds: ClassVar[tuple[Kind, ...]] = KINDS
    needs: ClassVar[tuple[type[Statistic], ...]] = ()

    def select(
        self, space: Space, k: int, weights: Weights, statistics: Statistics
    ) -> Int64[Tensor, "H k"]:
        """The k channels of each head with the largest scores, ties to the lower index."""
        return top_channels(space, k, self.scores(space, weights, statistics))

    def scores(
        self, space: Space, weights: Weights, statistics: Statistics
    ) -> Float64[Tensor, "H d"]:
        """Absolute sums, in float64."""
        projections = [axis for axis in space.axes if axis.role == "projection"]
        return torch.stack([_absolute_sums(axis, weights[axis.fqn]) for axis in projections]).sum(0)


def _absolute_sums(axis: Axis, weight: Tensor) -> Float64[Tensor, "H d"]:
    per_position = weight.detach().cpu().double().abs().movedim(axis.dim, 0).flatten(1).sum(1)
    return per_position[axis.layout.table()].sum(-1)
