"""JRNP: remove whole heads by the rank and the norm of their states."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float64
from torch import Tensor

from flame.options import option
from pruning.methods.interface import Statistics, Weights, summed
from pruning.methods.scoring import ScoringMethod
from pruning.spaces import Kind, Space
from pruning.state_rank import EPSILON
from pruning.statistics import StateSpectra, Statistic
from pruning.statistics.states import epsilon_bin

DIRECTIONS = ("high", "low")


@dataclass(frozen=True)
class JointRankNorm(ScoringMethod):
    """Joint Rank-Norm Pruning (arXiv 2602.02195): S_h = α r_h / d + (1 − α) n_h / max_j n_j.

    r_h is the threshold rank of head h's states, n_h their nuclear norm, both means over states
    sampled all along the calibration documents; d is the most that the rank can be, and j runs over
    the heads of the layer, so that a layer whose states are small is judged like the others. The
    paper removes the heads with the highest S and does not say α; others found the opposite sign,
    so both directions are here, and `random` is the control.
    """

    name: ClassVar[str] = "jrnp"
    kinds: ClassVar[tuple[Kind, ...]] = ("head",)
    needs: ClassVar[tuple[type[Statistic], ...]] = (StateSpectra,)
    comparable: ClassVar[bool] = True

    alpha: float = option(0.5, "weight of the rank against the norm, 0 to 1")
    epsilon: float = option(
        EPSILON, "singular values above this part of the largest count for the rank"
    )
    direction: str = option(
        "high", "which heads are removed: those of high rank and norm (the paper), or low"
    )

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is {self.alpha}: give 0 to 1")
        if self.direction not in DIRECTIONS:
            raise ValueError(f"direction is {self.direction!r}: choose from high, low")
        epsilon_bin(self.epsilon)

    def channel_scores(
        self, space: Space, weights: Weights, statistics: Statistics
    ) -> Float64[Tensor, "1 d"]:
        """S where low heads are removed, 1 − S where high ones are: within 0 and 1 in any layer."""
        joint = self._joint(summed(statistics, StateSpectra, space, self)).cpu()[None]
        return joint if self.direction == "low" else 1 - joint

    def _joint(self, statistic: StateSpectra) -> Float64[Tensor, " d"]:
        rank = statistic.threshold_rank(self.epsilon) / statistic.dimension()
        norm = statistic.nuclear_norm
        largest = norm.amax()
        share = norm / largest if float(largest) > 0 else norm
        return self.alpha * rank + (1 - self.alpha) * share
