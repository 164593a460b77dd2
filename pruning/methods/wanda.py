"""S-Wanda: keep the channels whose weights meet the largest inputs."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float64
from torch import Tensor

from pruning.methods.interface import Statistics, Weights, summed
from pruning.methods.scoring import ScoringMethod, summed_scores
from pruning.spaces import KINDS, Axis, Kind, Space
from pruning.statistics import InputSquares, Statistic
from pruning.statistics.gradients import projections


@dataclass(frozen=True)
class Wanda(ScoringMethod):
    """Score of a channel: the sum over its rows of |W_ij| · sqrt(mean x_j²), x the mixer's input.

    For key channels the rows are those of W_q and W_k: structured Wanda (arXiv 2602.04852, after
    arXiv 2306.11695). Only projections of the mixer's input count, so the output projection does
    not.
    """

    name: ClassVar[str] = "wanda"
    kinds: ClassVar[tuple[Kind, ...]] = KINDS
    needs: ClassVar[tuple[type[Statistic], ...]] = (InputSquares,)

    def channel_scores(
        self, space: Space, weights: Weights, statistics: Statistics
    ) -> Float64[Tensor, "H d"]:
        """Weights times input norms, in float64."""
        statistic = summed(statistics, InputSquares, space, self)
        size = (statistic.squares / statistic.tokens).sqrt().cpu()
        axes = [axis for axis in projections(space) if _is_of_input(axis, weights, len(size))]
        return summed_scores(space, axes, weights, lambda rows: rows.abs() @ size)


def _is_of_input(axis: Axis, weights: Weights, hidden: int) -> bool:
    return axis.dim == 0 and weights[axis.fqn].shape[1:] == (hidden,)
