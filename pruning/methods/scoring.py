"""What methods that score projections row by row have in common."""

from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float64
from torch import Tensor

from pruning.methods.interface import Weights
from pruning.spaces import Axis, Space

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
    """Scores over the mean of their head (of their layer, where the channels are a layer's).

    So they can be compared between heads where the scores themselves cannot: the delta rule
    normalises the q and k of a head, and the output norm what a head gives, so that the scale of
    a head's weights or activations says nothing about another head's.
    """
    mean = scores.mean(-1, keepdim=True)
    return scores / mean.clamp_min(torch.finfo(scores.dtype).tiny)
