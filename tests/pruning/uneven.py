"""Plans by hand whose widths differ between layers and heads."""

import torch

from flame.checkpoint.fingerprint import fingerprint
from flame.checkpoint.reference import ModelReference
from pruning.adapters import adapter_for
from pruning.planning.plan import Plan, pruned_config, spaces_of_kinds
from pruning.spaces import Kept, Kind, Space


def uneven_plan(
    model: ModelReference, kinds: tuple[Kind, ...], pad: bool = False, undo_gain: bool = True
) -> Plan:
    """Random channels of some kinds; every layer keeps another number of them, and most heads."""
    spaces = spaces_of_kinds(adapter_for(model.config), model.config, kinds)
    kept = {space.name: _uneven(space) for space in spaces}
    return Plan(
        method="by hand",
        options={},
        budget={},
        fingerprint=fingerprint(model.config, model.source()),
        config_before=model.config,
        config_after=pruned_config(model.config, kept, pad, undo_gain),
        kept=kept,
        calibration=None,
        versions={},
        pad=pad,
        undo_gain=undo_gain,
    )


def _uneven(space: Space) -> Kept:
    generator = torch.Generator().manual_seed(space.layer)
    orders = [torch.randperm(space.head_dim, generator=generator) for _ in range(space.num_heads)]
    return tuple(row[: _width(space, h)].sort().values for h, row in enumerate(orders))


def _width(space: Space, head: int) -> int:
    if space.kind == "head":
        return 1 + space.layer % space.head_dim
    return space.head_dim // 3 + (space.layer + head) % 3 * (space.head_dim // 6)
