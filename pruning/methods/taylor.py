"""Taylor: keep the channels without which the loss would change most, to first order."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float64, Int64
from torch import Tensor

from pruning.methods.interface import Statistics, Weights, top_channels
from pruning.spaces import KINDS, Kind, Space
from pruning.statistics import Statistic, WeightGradientProducts


@dataclass(frozen=True)
class Taylor:
    """Score of a channel: the sum of |W_ij G_ij| over its entries in all projections.

    G is the gradient of the loss summed over all calibration tokens. It is the element-wise first
    order importance of LLM-Pruner (arXiv 2305.11627), which arXiv 2602.04852 calls Grad.
    """

    name: ClassVar[str] = "taylor"
    kinds: ClassVar[tuple[Kind, ...]] = KINDS
    needs: ClassVar[tuple[type[Statistic], ...]] = (WeightGradientProducts,)

    def select(
        self, space: Space, k: int, weights: Weights, statistics: Statistics
    ) -> Int64[Tensor, "H k"]:
        """The k channels of each head with the largest scores, ties to the lower index."""
        return top_channels(space, k, self.scores(space, weights, statistics))

    def scores(
        self, space: Space, weights: Weights, statistics: Statistics
    ) -> Float64[Tensor, "H d"]:
        """Nats of the loss per token: comparable between all channels of a model as they are."""
        statistic = statistics[WeightGradientProducts]
        assert isinstance(statistic, WeightGradientProducts)
        if int(statistic.tokens) == 0:
            raise ValueError(f"{space.name}: no tokens were seen, so taylor has nothing to go by")
        return (statistic.products / statistic.tokens).cpu()
