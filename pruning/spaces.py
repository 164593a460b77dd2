"""Spaces: sets of channels that can only be kept or dropped together.

A space is a grid of `num_heads` x `head_dim` channels with the list of tensor axes that it indexes.
Each axis says through a layout where a channel lies along the tensor's dimension, so that one
selection, a row of channels for each head, slices every tensor of the space consistently. Rows may
differ in length: a budget that is shared by heads gives some of them more channels than others.

The kinds use the grid so:

- key: one row per key head; q and k of a head share the row's selection.
- value: one row for the whole layer, because the output norm's weight is shared by all heads; a
  channel then lies at one position in every head.
- head: one row whose channels are whole key-head groups; a channel is a block of positions.
- value-head: one row per key head, whose channels are the value heads that it serves (grouped value
  attention); every row keeps as many, and their key head stays.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from pruning.layouts import Layout

Kind = Literal["key", "value", "head", "value-head"]
Role = Literal["projection", "convolution", "vector", "norm", "gate", "inner"]

KINDS: tuple[Kind, ...] = ("key", "value", "head", "value-head")
NOUNS: dict[Kind, str] = {
    "key": "key channels",
    "value": "value channels",
    "head": "heads",
    "value-head": "value heads a group",
}
"""What is kept or dropped, in words, by kind."""

HEAD_KINDS: tuple[Kind, ...] = ("head", "value-head")
"""Kinds whose channels are whole heads: their numbers need not be multiples of anything."""

OF_KEY_HEADS: tuple[Kind, ...] = ("key", "value-head")
"""Kinds with a row for each key head, which goes with it."""

Kept = tuple[Int64[Tensor, " k_h"], ...]
"""A selection: for each head of a space the channels to keep, in increasing order."""


@dataclass(frozen=True)
class Axis:
    """One dimension of one tensor that a space indexes; the tensor is sliced along it."""

    fqn: str
    """The tensor's name in the state dict of the model."""
    dim: int
    """The dimension that is sliced."""
    layout: Layout
    """How channels map to positions along `dim`."""
    role: Role = "projection"
    """What the tensor is: methods that score weights look at projections only, which take the
    mixer's input or give its output. A gate's last projection, whose input is a narrow one of its
    own, is not among them. An inner axis is the narrow dimension between a gate's two projections,
    whose channels are fitted anew and not chosen (`pruning.repair.gates`)."""


@dataclass(frozen=True)
class Space:
    """`num_heads` x `head_dim` channels of one layer that are kept or dropped together."""

    name: str
    """Unique in the model, such as `layers.3.key`."""
    kind: Kind
    layer: int
    """Index of the decoder layer, counted from 0."""
    num_heads: int
    head_dim: int
    axes: tuple[Axis, ...]

    @property
    def noun(self) -> str:
        """The channels in words, for messages."""
        return NOUNS[self.kind]


def output_axis(space: Space) -> Axis:
    """The axis of the output projection, which all but key spaces have."""
    return next(axis for axis in space.axes if axis.role == "projection" and axis.dim == 1)


def positions(axis: Axis, kept: Kept) -> Int64[Tensor, " n"]:
    """The positions along the axis that survive when `kept` survives, in increasing order.

    Args:
        axis: the axis to slice.
        kept: the channels to keep, per head.

    Returns:
        Indices for `index_select` along `axis.dim`; positions outside the space are among them.
    """
    return survives(axis, kept).nonzero().squeeze(-1)


def survives(axis: Axis, kept: Kept) -> Bool[Tensor, " size"]:
    """Whether each position along the axis survives when `kept` survives."""
    mask = torch.ones(axis.layout.size, dtype=torch.bool)
    mask[dropped_positions(axis, kept)] = False
    return mask


def dropped_positions(axis: Axis, kept: Kept) -> Int64[Tensor, " n"]:
    """The positions along the axis that are removed when only `kept` survives, increasing."""
    table = axis.layout.table()
    dropped = torch.ones(table.shape[:2], dtype=torch.bool)
    for of_head, channels in zip(dropped, kept, strict=True):
        of_head[channels.cpu()] = False
    return table[dropped].flatten().sort().values


def rows(kept: Int64[Tensor, "H k"]) -> Kept:
    """The rows of a selection in which every head keeps k channels, one tensor a head."""
    return tuple(kept.cpu())


def check_kept(space: Space, kept: Kept) -> None:
    """Raise ValueError unless `kept` is a selection for `space`.

    A selection has `num_heads` rows of int64, each of 1 to `head_dim` channels, strictly increasing
    within [0, head_dim).
    """
    if len(kept) != space.num_heads:
        raise ValueError(
            f"{space.name}: kept channels of {len(kept)} heads, expected {space.num_heads}"
        )
    for head, channels in enumerate(kept):
        _check_row(space, head, channels)


def _check_row(space: Space, head: int, channels: Tensor) -> None:
    where = f"{space.name}, head {head}"
    if channels.dtype != torch.int64 or channels.ndim != 1:
        raise ValueError(
            f"{where}: kept channels are {channels.dtype} of shape {list(channels.shape)}, "
            "expected int64 of shape [k]"
        )
    check_count(len(channels), space.head_dim, f"{space.noun} of {where}")
    if int(channels.min()) < 0 or int(channels.max()) >= space.head_dim:
        raise ValueError(
            f"{where}: kept channels {int(channels.min())}..{int(channels.max())} leave the range "
            f"0..{space.head_dim - 1}"
        )
    if len(channels) > 1 and int(channels.diff().min()) <= 0:
        raise ValueError(f"{where}: kept channels must be strictly increasing")


def widths_of(spaces: Iterable[Space], kept: Mapping[str, Kept]) -> dict[str, tuple[int, ...]]:
    """How many channels each head keeps, by the name of the planned space.

    Where there is a row for each key head, surviving heads alone are listed.
    """
    planned = [space for space in spaces if space.name in kept]
    heads = {space.layer: kept[space.name][0].tolist() for space in planned if space.kind == "head"}
    widths = {}
    for space in planned:
        of_heads = kept[space.name]
        staying: Iterable[int] = range(len(of_heads))
        if space.kind in OF_KEY_HEADS:
            staying = heads.get(space.layer, staying)
        widths[space.name] = tuple(len(of_heads[head]) for head in staying)
    return widths


def check_count(k: int, available: int, what: str = "channels") -> None:
    """Raise ValueError unless 1 <= k <= available."""
    if not 1 <= k <= available:
        raise ValueError(
            f"cannot keep {k} of {available} {what}: choose a number from 1 to {available}"
        )
