"""L2: keep the channels whose projection weights have the largest norms."""

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
class L2(ScoringMethod):
    """Score of a channel: the L2 norms of its rows (columns) of the projections, added up.

    For key channels that is |W_q,i| + |W_k,i|, the magnitude of arXiv 2602.04852. Convolutions do
    not count. No data is read.
    """

    name: ClassVar[str] = "l2"
    kinds: ClassVar[tuple[Kind, ...]] = KINDS
    needs: ClassVar[tuple[type[Statistic], ...]] = ()

    def channel_scores(
        self, space: Space, weights: Weights, statistics: Statistics
    ) -> Float64[Tensor, "H d"]:
        """Sums of norms, in float64."""
        return summed_scores(space, projections(space), weights, lambda rows: rows.norm(dim=1))
