"""Taylor: keep the channels without which the loss would change most, to first order."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float64
from torch import Tensor

from pruning.methods.interface import Statistics, Weights, summed
from pruning.methods.scoring import ScoringMethod
from pruning.spaces import KINDS, Kind, Space
from pruning.statistics import Statistic, WeightGradientProducts


@dataclass(frozen=True)
class Taylor(ScoringMethod):
    """Score of a channel: the sum of |W_ij G_ij| over its entries in all projections.

    G is the gradient of the loss summed over all calibration tokens. It is the element-wise first
    order importance of LLM-Pruner (arXiv 2305.11627), which arXiv 2602.04852 calls Grad.
    """

    name: ClassVar[str] = "taylor"
    kinds: ClassVar[tuple[Kind, ...]] = KINDS
    needs: ClassVar[tuple[type[Statistic], ...]] = (WeightGradientProducts,)
    comparable: ClassVar[bool] = True

    def channel_scores(
        self, space: Space, weights: Weights, statistics: Statistics
    ) -> Float64[Tensor, "H d"]:
        """Nats of the loss per token that a channel is expected to be worth, in float64."""
        statistic = summed(statistics, WeightGradientProducts, space, self)
        return (statistic.products / statistic.tokens).cpu()
