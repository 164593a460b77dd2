"""Cuts: what a plan leaves of each dimension of each tensor."""

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
"""A parameter times c has gradients over c, and moments accordingly."""


@dataclass(frozen=True)
class Cut:
    """What survives of one dimension of a tensor."""

    dim: int
    size: int
    """Length of the dimension before."""
    kept: Int64[Tensor, " n"]
    """Positions that survive, in increasing order."""
    blank: Int64[Tensor, " m"]
    """Those of the n that are padding, and become zero."""
    factor: float = 1.0
    """What the parameter is multiplied by: makes up for padding in a norm."""


Cuts = Mapping[str, tuple[Cut, ...]]
"""By parameter: its dimensions that are cut."""


def cuts_of(plan: Plan, config: Config) -> dict[str, tuple[Cut, ...]]:
    """What survives of each parameter that a plan, which fits the config, prunes."""
    spaces = planned_spaces(plan, config)
    return cuts_of_spaces(spaces, plan.kept, padded(spaces, plan.kept) if plan.pad else plan.kept)


def cuts_of_spaces(
    spaces: Iterable[Space], kept: Mapping[str, Kept], filled: Mapping[str, Kept]
) -> dict[str, tuple[Cut, ...]]:
    """Cuts of all tensors that `spaces` index; of one dimension, what every space keeps is left.

    Args:
        spaces: planned ones.
        kept: their selections.
        filled: the same, or with padding.
    """
    of_dimension: dict[tuple[str, int], list[tuple[Space, Axis]]] = {}
    for space in spaces:
        for axis in space.axes:
            of_dimension.setdefault((axis.fqn, axis.dim), []).append((space, axis))
    cuts: dict[str, tuple[Cut, ...]] = {}
    for (fqn, _), axes in of_dimension.items():
        cuts[fqn] = (*cuts.get(fqn, ()), _cut(axes, kept, filled))
    return cuts


def cut_tensor(name: str, tensor: Tensor, cuts: Iterable[Cut]) -> Tensor:
    """What is left of a tensor; `name` tells a parameter from its moments."""
    for cut in cuts:
        tensor = tensor.index_select(cut.dim, cut.kept)
        if len(cut.blank):
            tensor.index_fill_(cut.dim, cut.blank, 0)
        if cut.factor != 1:
            tensor *= cut.factor ** _POWERS.get(name.rpartition(".")[2], 1)
    return tensor


def _cut(
    axes: Iterable[tuple[Space, Axis]], kept: Mapping[str, Kept], filled: Mapping[str, Kept]
) -> Cut:
    """The cut of one dimension by all spaces that index it."""
    axes = list(axes)
    axis, factor = axes[0][1], 1.0
    stays = torch.ones(axis.layout.size, dtype=torch.bool)
    real = stays.clone()
    for space, axis in axes:
        stays &= survives(axis, filled[space.name])
        real &= survives(axis, kept[space.name])
        if axis.role == "norm":
            factor = math.sqrt(len(kept[space.name][0]) / len(filled[space.name][0]))
    blank = (~real[stays]).nonzero().squeeze(-1)
    return Cut(axis.dim, len(stays), stays.nonzero().squeeze(-1), blank, factor)
