"""Activation norm: keep the channels that are largest where the delta rule sees them."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float64, Int64
from torch import Tensor

from pruning.methods.interface import Statistics, Weights, top_channels
from pruning.methods.scoring import relative
from pruning.spaces import Kind, Space
from pruning.statistics import KeySquares, Statistic, ValueSquares


@dataclass(frozen=True)
class ActivationNorm:
    """Score of a channel: the root of the mean square of its activation at the delta-rule call.

    After convolution and activation and before the L2 norm: q and k together for a key channel,
    v of every value head for a value channel. It has no paper of its own: of key channels it is
    what the diagonal of DRRQR's Gram matrix says, and shows what the rest of it is worth.
    """

    name: ClassVar[str] = "activation-norm"
    kinds: ClassVar[tuple[Kind, ...]] = ("key", "value")
    needs: ClassVar[tuple[type[Statistic], ...]] = (KeySquares, ValueSquares)

    def select(
        self, space: Space, k: int, weights: Weights, statistics: Statistics
    ) -> Int64[Tensor, "H k"]:
        """The k channels of each head with the largest scores, ties to the lower index."""
        return top_channels(space, k, _norms(space, statistics))

    def scores(
        self, space: Space, weights: Weights, statistics: Statistics
    ) -> Float64[Tensor, "H d"]:
        """Norms over the mean of their head, in float64."""
        return relative(_norms(space, statistics))


def _norms(space: Space, statistics: Statistics) -> Float64[Tensor, "H d"]:
    statistic = statistics[KeySquares if space.kind == "key" else ValueSquares]
    assert isinstance(statistic, KeySquares | ValueSquares)
    if int(statistic.terms) == 0:
        raise ValueError(
            f"{space.name}: no tokens were seen, so activation-norm has nothing to go by"
        )
    return (statistic.squares / statistic.terms).sqrt().cpu()
