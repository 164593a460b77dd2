"""Methods that score every channel by itself, and keep the k best of each head."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import ClassVar

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from pruning.methods.interface import Statistics, Weights, top_channels
from pruning.spaces import Axis, Space


class ScoringMethod(ABC):
    """Base of methods whose choice is the k largest of one score a channel.

    A subclass is a frozen dataclass with `name`, `kinds` and `needs` (`Method`), and says by
    `comparable` whether its scores mean the same in every head of a model.
    """

    comparable: ClassVar[bool] = False

    @abstractmethod
    def channel_scores(
        self, space: Space, weights: Weights, statistics: Statistics
    ) -> Float64[Tensor, "H d"]:
        """The score of each channel, larger for channels that matter more.

        Raises:
            ValueError: nothing has been summed into a statistic that the method needs.
        """

    def select(
        self, space: Space, k: int, weights: Weights, statistics: Statistics
    ) -> Int64[Tensor, "H k"]:
        """The k channels of each head with the largest scores, in increasing order.

        Ties go to the lower index. Raises ValueError if k is out of range or a score is not finite.
        """
        return top_channels(space, k, self.channel_scores(space, weights, statistics))

    def scores(
        self, space: Space, weights: Weights, statistics: Statistics
    ) -> Float64[Tensor, "H d"]:
        """Scores that compare between heads: over the mean of their head unless `comparable`."""
        found = self.channel_scores(space, weights, statistics)
        return found if self.comparable else relative(found)


Measure = Callable[[Float64[Tensor, "n m"]], Float64[Tensor, " n"]]
"""A score for each row of a matrix."""


def summed_scores(
    space: Space, axes: Iterable[Axis], weights: Weights, measure: Measure
) -> Float64[Tensor, "H d"]:
    """`measure` of the slices of each tensor along its axis, summed over a channel's positions.

    Args:
        space: whose channels are scored.
        axes: those of its axes that count.
        weights: the tensors, by name.
        measure: scores one slice a row, in float64.
    """
    total = torch.zeros(space.num_heads, space.head_dim, dtype=torch.float64)
    for axis in axes:
        slices = weights[axis.fqn].detach().cpu().double().movedim(axis.dim, 0).flatten(1)
        total += measure(slices)[axis.layout.table()].sum(-1)
    return total


def relative(scores: Float64[Tensor, "H d"]) -> Float64[Tensor, "H d"]:
    """Scores divided by the mean of their row: a head, or a layer where the channels are a layer's.

    Scores are at least 0; a row of zeros stays zeros. So they can be compared between heads where
    the scores themselves cannot: the delta rule normalises the q and k of a head, and the output
    norm what a head gives, so that the scale of a head's weights or activations says nothing about
    another head's.
    """
    mean = scores.mean(-1, keepdim=True)
    return scores / mean.clamp_min(torch.finfo(scores.dtype).tiny)
