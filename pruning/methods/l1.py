"""L1: keep the channels whose projection weights have the largest absolute sums."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float64
from torch import Tensor

from pruning.methods.interface import Statistics, Weights
from pruning.methods.scoring import ScoringMethod, summed_scores
from pruning.spaces import KINDS, Kind, Space
from pruning.statistics import Statistic
from pruning.statistics.gradients import projections


@dataclass(frozen=True)
class L1(ScoringMethod):
    """Score of a channel: the sum of |W| over what it has of every projection.

    For key channels that is the row sum of |W_q| + |W_k| (arXiv 2602.04852). Convolutions do not
    count. No data is read.
    """

    name: ClassVar[str] = "l1"
    kinds: ClassVar[tuple[Kind, ...]] = KINDS
    needs: ClassVar[tuple[type[Statistic], ...]] = ()

    def channel_scores(
        self, space: Space, weights: Weights, statistics: Statistics
    ) -> Float64[Tensor, "H d"]:
        """Absolute sums, in float64."""
        return summed_scores(space, projections(space), weights, lambda rows: rows.abs().sum(1))
