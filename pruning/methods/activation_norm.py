"""Activation norm: keep the channels that are largest where the delta rule sees them."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float64
from torch import Tensor

from pruning.methods.interface import Statistics, Weights, summed
from pruning.methods.scoring import ScoringMethod
from pruning.spaces import Kind, Space
from pruning.statistics import KeySquares, Statistic, ValueSquares


@dataclass(frozen=True)
class ActivationNorm(ScoringMethod):
    """Score of a channel: the root of the mean square of its activation at the delta-rule call.

    After convolution and activation and before the L2 norm: q and k together for a key channel,
    v of every value head for a value channel. It has no paper of its own: of key channels it is
    what the diagonal of DRRQR's Gram matrix says, and shows what the rest of it is worth.
    """

    name: ClassVar[str] = "activation-norm"
    kinds: ClassVar[tuple[Kind, ...]] = ("key", "value")
    needs: ClassVar[tuple[type[Statistic], ...]] = (KeySquares, ValueSquares)

    def channel_scores(
        self, space: Space, weights: Weights, statistics: Statistics
    ) -> Float64[Tensor, "H d"]:
        """Roots of mean squares, in float64."""
        kind: type[KeySquares | ValueSquares]
        kind = KeySquares if space.kind == "key" else ValueSquares
        statistic = summed(statistics, kind, space, self)
        return (statistic.squares / statistic.terms).sqrt().cpu()
