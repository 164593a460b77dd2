"""L2: keep the channels whose projection weights have the largest norms."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float64, Int64
from torch import Tensor

from pruning.methods.interface import Statistics, Weights, top_channels
from pruning.methods.scoring import relative, summed_scores
from pruning.spaces import KINDS, Kind, Space
from pruning.statistics import Statistic
from pruning.statistics.gradients import projections


@dataclass(frozen=True)
class L2:
    """Score of a channel: the L2 norms of its rows (columns) of the projections, added up.

    For key channels that is |W_q,i| + |W_k,i|, the magnitude of arXiv 2602.04852. Convolutions do
    not count. No data is read.
    """

    name: ClassVar[str] = "l2"
    kinds: ClassVar[tuple[Kind, ...]] = KINDS
    needs: ClassVar[tuple[type[Statistic], ...]] = ()

    def select(
        self, space: Space, k: int, weights: Weights, statistics: Statistics
    ) -> Int64[Tensor, "H k"]:
        """The k channels of each head with the largest scores, ties to the lower index."""
        return top_channels(space, k, _norms(space, weights))

    def scores(
        self, space: Space, weights: Weights, statistics: Statistics
    ) -> Float64[Tensor, "H d"]:
        """Norms over the mean of their head, in float64."""
        return relative(_norms(space, weights))


def _norms(space: Space, weights: Weights) -> Float64[Tensor, "H d"]:
    return summed_scores(space, projections(space), weights, lambda rows: rows.norm(dim=1))
