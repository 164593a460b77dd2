"""The gain: how much larger a layer's outputs get because channels are gone, not zero.

The delta rule scales queries by d^-1/2 of the key channels that it sees. With d' of d it gives
sqrt(d / d') times what zeros in the others would give, and the output norm takes that back only
where the outputs' mean square is far above its eps. A norm over d' of d value channels in turn
divides by a mean that is d / d' times as large. Whole heads have no gain: each has its own outputs.

A plan undoes both exactly for a layer's output (`Adapter.resize`, `pruning.transform.slices`),
or leaves them as arXiv 2602.04852 publishes the pruned models.
"""

import math
from collections.abc import Iterable, Mapping

from pruning.adapters.interface import Config
from pruning.planning.budgets import Budget
from pruning.planning.padding import padded
from pruning.spaces import Kept, Kind, Space, widths_of

_EFFECTS: dict[Kind, str] = {
    "key": "multiplies the delta rule's outputs by",
    "value": "divides the output norm's outputs by",
}


def gain_notes(
    spaces: Iterable[Space], kept: Mapping[str, Kept], budget: Budget, config: Config
) -> list[str]:
    """One sentence for each kind whose gain a plan leaves, with its size.

    Args:
        spaces: the planned spaces.
        kept: their selections.
        budget: says whether heads are filled up, and whether all is to be as published.
        config: the dense model's.
    """
    spaces = list(spaces)
    widths = widths_of(spaces, padded(spaces, kept) if budget.pad else kept)
    reason = f"no key of a {config['model_type']} config undoes it; training on may"
    if budget.paper:
        reason = "as published (--paper); without --paper it is undone"
    notes = []
    for kind, effect in _EFFECTS.items():
        of_kind = [space for space in spaces if space.kind == kind]
        gains = [math.sqrt(s.head_dim / width) for s in of_kind for width in widths[s.name]]
        if gains and max(gains) > 1:
            notes.append(f"removing {of_kind[0].noun} {effect} {_range(gains)}: {reason}")
    return notes


def _range(gains: Iterable[float]) -> str:
    shown = sorted({f"{gain:.2f}" for gain in gains}, key=float)
    return shown[0] if len(shown) == 1 else f"{shown[0]} to {shown[-1]}"
