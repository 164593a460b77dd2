"""S-Wanda: keep the channels whose weights, times the norms of what they multiply, are largest."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float64
from torch import Tensor

from pruning.methods.interface import Statistics, Weights, summed
from pruning.methods.scoring import ScoringMethod, summed_scores
from pruning.spaces import KINDS, Kind, Space, output_axis
from pruning.statistics import InputSquares, OutputSquares, Statistic
from pruning.statistics.gradients import projections


@dataclass(frozen=True)
class Wanda(ScoringMethod):
    """Score of a channel: the sum over its weights of |W_ij| · sqrt(mean x_j²), x their input.

    For key channels the weights are rows of W_q and W_k, and x is the mixer's input: structured
    Wanda (arXiv 2602.04852, after arXiv 2306.11695). Value channels and heads are scored where they
    are consumed: by their columns of the output projection, x being what the heads give to it,
    after norm and gate.
    """

    name: ClassVar[str] = "wanda"
    kinds: ClassVar[tuple[Kind, ...]] = KINDS
    needs: ClassVar[tuple[type[Statistic], ...]] = (InputSquares, OutputSquares)

    def channel_scores(
        self, space: Space, weights: Weights, statistics: Statistics
    ) -> Float64[Tensor, "H d"]:
        """Weights times input norms, in float64."""
        if space.kind == "key":
            size = _root_mean(summed(statistics, InputSquares, space, self))
            axes = projections(space)
            return summed_scores(space, axes, weights, lambda rows: rows.abs() @ size)
        size = _root_mean(summed(statistics, OutputSquares, space, self))
        axes = [output_axis(space)]
        return summed_scores(space, axes, weights, lambda columns: columns.abs().sum(1) * size)


def _root_mean(statistic: InputSquares | OutputSquares) -> Float64[Tensor, " n"]:
    return (statistic.squares / statistic.tokens).sqrt().cpu()
