"""The gain: how much larger a layer's outputs get because channels are gone, not zero.

The delta rule scales queries by d^-1/2 of the key channels that it sees. With d' of d it gives
sqrt(d / d') times what zeros in the others would give, and the output norm takes that back only
where the outputs' mean square is far above its eps. A norm over d' of d value channels in turn
divides by a mean that is d / d' times as large. Whole heads have no gain: each has its own outputs.

A plan undoes both exactly for a layer's output (`Adapter.resize`, `pruning.transform.slices`),
or leaves them as arXiv 2602.04852 publishes the pruned models. Neither is better for every model:
what half the channels give back of a value may be smaller than what all of them did, and the gain
makes up for that (`pruning.damage.gain` measures it).
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

from pruning.adapters.interface import Config
from pruning.planning.budgets import Budget
from pruning.planning.padding import padded
from pruning.planning.plan import Plan, planned_spaces, pruned_config
from pruning.spaces import Kept, Kind, Space, widths_of

_EFFECTS: dict[Kind, str] = {
    "key": "multiplies the delta rule's outputs by",
    "value": "divides the output norm's outputs by",
}


def gain_notes(
    spaces: Iterable[Space], kept: Mapping[str, Kept], pad: bool, reason: str
) -> list[str]:
    """One sentence for each kind whose gain a plan leaves, with its size.

    Args:
        spaces: the planned spaces.
        kept: their selections.
        pad: whether heads are filled up.
        reason: why it is left.
    """
    spaces = list(spaces)
    widths = widths_of(spaces, padded(spaces, kept) if pad else kept)
    notes = []
    for kind, effect in _EFFECTS.items():
        of_kind = [space for space in spaces if space.kind == kind]
        gains = [math.sqrt(s.head_dim / width) for s in of_kind for width in widths[s.name]]
        if gains and max(gains) > 1:
            notes.append(f"removing {of_kind[0].noun} {effect} {_range(gains)}: {reason}")
    return notes


def why_kept(budget: Budget, config: Config) -> str:
    """Why a plan within `budget` leaves the gain of a model of this config."""
    if budget.paper:
        return "as published (--paper); without --paper it is undone"
    if budget.gain == "keep":
        return "as asked for (--gain keep)"
    return f"no key of a {config['model_type']} config undoes it; training on may"


def with_gain(plan: Plan) -> Plan | None:
    """`plan`, which undoes the gain, with the gain kept; None if there is none or it keeps it."""
    spaces = planned_spaces(plan, plan.config_before)
    notes = gain_notes(spaces, plan.kept, plan.pad, "this is kept")
    if not plan.undo_gain or not notes:
        return None
    config = pruned_config(plan.config_before, plan.kept, plan.pad, undo_gain=False)
    return replace(plan, undo_gain=False, config_after=config, notes=(*plan.notes, *notes))


def _range(gains: Iterable[float]) -> str:
    shown = sorted({f"{gain:.2f}" for gain in gains}, key=float)
    return shown[0] if len(shown) == 1 else f"{shown[0]} to {shown[-1]}"
