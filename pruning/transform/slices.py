"""Slices: which positions of each tensor dimension a plan keeps."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Tensor

from pruning.adapters.interface import Config
from pruning.planning.padding import padded
from pruning.planning.plan import Plan, planned_spaces
from pruning.spaces import Axis, Kept, Space, survives

_POWERS = {"exp_avg": -1, "exp_avg_sq": -2}
"""Where a parameter is multiplied by c, its gradients are divided by c, and its optimizer moments
by c and c²."""


@dataclass(frozen=True)
class Slice:
    """The positions that survive along one dimension of a tensor."""

    dim: int
    size: int
    """Length of the dimension before."""
    kept: Int64[Tensor, " n"]
    """Positions that survive, in increasing order."""
    blank: Int64[Tensor, " m"]
    """Which of the n surviving positions are padding and become zero."""
    factor: float = 1.0
    """A factor for the parameter: of an output norm, whose mean runs over fewer channels."""


Slices = Mapping[str, tuple[Slice, ...]]
"""By parameter: its dimensions that are part."""


def slices_of(plan: Plan, config: Config) -> dict[str, tuple[Slice, ...]]:
    """The slices of each parameter that `plan`, which fits the config, prunes."""
    spaces = planned_spaces(plan, config)
    filled = padded(spaces, plan.kept) if plan.pad else plan.kept
    return slices_of_spaces(spaces, plan.kept, filled, plan.undo_gain)


def slices_of_spaces(
    spaces: Iterable[Space],
    kept: Mapping[str, Kept],
    filled: Mapping[str, Kept],
    undo_gain: bool = False,
) -> dict[str, tuple[Slice, ...]]:
    """The slices of all tensors that `spaces` index.

    Where several spaces index one dimension, a position survives only if all of them keep it.

    Args:
        spaces: the planned spaces.
        kept: their selections.
        filled: the same selections, with padding where the plan pads.
        undo_gain: whether output norms give what zeros in the dropped channels would; otherwise
            they give what a norm over the kept channels alone does.
    """
    of_dimension: dict[tuple[str, int], list[tuple[Space, Axis]]] = {}
    for space in spaces:
        for axis in space.axes:
            of_dimension.setdefault((axis.fqn, axis.dim), []).append((space, axis))
    slices: dict[str, tuple[Slice, ...]] = {}
    for (fqn, _), axes in of_dimension.items():
        slices[fqn] = (*slices.get(fqn, ()), _slice(axes, kept, filled, undo_gain))
    return slices


def slice_tensor(name: str, tensor: Tensor, slices: Iterable[Slice]) -> Tensor:
    """The sliced tensor; its `name` tells a parameter from its optimizer moments."""
    for part in slices:
        tensor = tensor.index_select(part.dim, part.kept)
        if len(part.blank):
            tensor.index_fill_(part.dim, part.blank, 0)
        if part.factor != 1:
            tensor *= part.factor ** _POWERS.get(name.rpartition(".")[2], 1)
    return tensor


def _slice(
    axes: Iterable[tuple[Space, Axis]],
    kept: Mapping[str, Kept],
    filled: Mapping[str, Kept],
    undo_gain: bool,
) -> Slice:
    """The slice of one dimension by all spaces that index it."""
    axes = list(axes)
    axis, factor = axes[0][1], 1.0
    stays = torch.ones(axis.layout.size, dtype=torch.bool)
    real = stays.clone()
    for space, axis in axes:
        stays &= survives(axis, filled[space.name])
        real &= survives(axis, kept[space.name])
        if axis.role == "norm":
            mean_over = space.head_dim if undo_gain else len(kept[space.name][0])
            factor = math.sqrt(mean_over / len(filled[space.name][0]))
    blank = (~real[stays]).nonzero().squeeze(-1)
    return Slice(axis.dim, len(stays), stays.nonzero().squeeze(-1), blank, factor)
