"""How a plan's widths, by space, become the sizes that a config has.

A stock config has one number for all layers and heads. Where a plan's widths differ between them,
the config is that of the family's own slim class (`flame.models.widths`).
"""

import math
from collections.abc import Iterable, Mapping

from flame.models.widths import slim_config
from pruning.adapters.interface import Config, Widths
from pruning.spaces import OF_KEY_HEADS, Kind, Space, check_count

ByLayer = Mapping[int, tuple[int, ...]]
"""Kept channels of each head, by layer."""

_LISTS: dict[Kind, str] = {"key": "key", "value": "value", "head": "heads"}
"""Names of the kinds in a slim config, whose key heads all serve as many value heads."""


def widths_by_kind(spaces: Iterable[Space], widths: Widths) -> dict[Kind, dict[int, tuple]]:
    """Widths of each planned kind by layer, checked against the model's spaces.

    Raises:
        ValueError: a space is unknown, a kind is planned in some layers only, or a width or the
            number of heads is not what the spaces allow.
    """
    spaces = list(spaces)
    planned: dict[Kind, dict[int, tuple]] = {}
    for kind in dict.fromkeys(space.kind for space in spaces if space.name in widths):
        of_kind = [space for space in spaces if space.kind == kind]
        _check_names([space.name for space in of_kind if space.name not in widths])
        planned[kind] = {space.layer: tuple(widths[space.name]) for space in of_kind}
    _check_names(sorted(set(widths) - {space.name for space in spaces}))
    for space in spaces:
        if space.kind in planned:
            _check_row(space, planned[space.kind][space.layer], planned.get("head", {}))
    return planned


def _check_names(differing: list[str]) -> None:
    if differing:
        raise ValueError(f"widths and the model's spaces differ: {', '.join(differing)}")


def _check_row(space: Space, row: tuple[int, ...], heads: ByLayer) -> None:
    whole_groups = space.kind in OF_KEY_HEADS and heads
    expected = heads[space.layer][0] if whole_groups else space.num_heads
    for width in row:
        check_count(width, space.head_dim, f"{space.noun} of {space.name}")
    if len(row) != expected:
        raise ValueError(f"{space.name} has widths of {len(row)} heads, expected {expected}")


def uniform_sizes(planned: Mapping[Kind, ByLayer]) -> dict[Kind, int] | None:
    """The one width of each planned kind; None if layers or heads differ in any."""
    sizes = {kind: {w for row in rows.values() for w in row} for kind, rows in planned.items()}
    if any(len(distinct) > 1 for distinct in sizes.values()):
        return None
    return {kind: next(iter(distinct)) for kind, distinct in sizes.items()}


def ragged_config(
    config: Config, planned: Mapping[Kind, ByLayer], depth: int, undo_gain: bool
) -> Config:
    """The slim form of a stock config, with the planned widths of every layer; not checked yet.

    Args:
        config: the dense stock config.
        planned: the kept channels of each head by layer, for each planned kind of space. Value
            and head spaces have one number a layer, key spaces one a key head.
        depth: layers of the model; those that `planned` lacks have no recurrent state.
        undo_gain: whether the heads keep the dense model's scales.
    """
    lists = {}
    for kind, rows in planned.items():
        of_layers = [rows.get(layer) for layer in range(depth)]
        lists[_LISTS[kind]] = [
            None if row is None else list(row) if kind == "key" else row[0] for row in of_layers
        ]
    return slim_config(config, lists, undo_gain)


def expansion(base: int, target: int) -> float:
    """A factor with int(base * factor) == target, the nearest to target / base.

    The quotient itself is off by one for some pairs, 98 and 128 among them, where the product
    rounds to below the target.
    """
    factor = target / base
    while int(base * factor) < target:
        factor = math.nextafter(factor, math.inf)
    return factor
