"""Low-rank gates whose inner width is the head's: fitted anew where heads become narrower.

Such gates have inner axes in their value space, two for each gate: the rows of its first projection
and the columns of its second.
"""

from collections.abc import Iterable, Mapping
from itertools import pairwise

import torch
from torch import Tensor

from flame.checkpoint.source import TensorSource
from flame.errors import UserError, first_line
from pruning.methods import Method
from pruning.repair.low_rank import best_low_rank
from pruning.spaces import Kept, Space, survives
from pruning.statistics import GateMoments, Statistic


def gates_of(space: Space) -> list[tuple[str, str]]:
    """Names of the first and the second projection of each gate with inner axes in `space`."""
    inner = [axis.fqn for axis in space.axes if axis.role == "inner"]
    return list(pairwise(inner))[::2]


def refits(spaces: Iterable[Space]) -> bool:
    """Whether pruning these spaces makes gates narrower."""
    return any(gates_of(space) for space in spaces)


def needs_of(method: Method, spaces: Iterable[Space]) -> tuple[type[Statistic], ...]:
    """The statistics that a plan in these spaces needs: the method's, and those of the gates.

    Of the method's only those for such spaces: its errors of value channels take longer than those
    of key channels.
    """
    spaces = list(spaces)
    kinds = {space.kind for space in spaces}
    of_method = [kind for kind in method.needs if kinds & set(kind.kinds)]
    return (*of_method, *([GateMoments] if refits(spaces) else []))


def refitted_gates(
    spaces: Iterable[Space],
    kept: Mapping[str, Kept],
    source: TensorSource,
    statistics: Mapping[str, Mapping[type[Statistic], Statistic]],
) -> dict[str, Tensor]:
    """Both projections of every gate that becomes narrower, by name, in the pruned size, float64.

    Of the dense map, the rows that stay are approximated as `best_low_rank` says.

    Args:
        spaces: the planned spaces.
        kept: their selections.
        source: the dense model's tensors.
        statistics: by the value space's name, `GateMoments`.

    Raises:
        UserError: no data were seen, or a gate's sums have no answer; the layer is named.
    """
    spaces = list(spaces)
    found: dict[str, Tensor] = {}
    for space in spaces:
        for gate, (first, second) in enumerate(gates_of(space)):
            sums = statistics.get(space.name, {}).get(GateMoments)
            if not isinstance(sums, GateMoments) or sums.is_empty:
                raise UserError(f"{space.name}: no data were seen to fit the low-rank gates by")
            rows = _rows(second, spaces, kept)
            moment = (sums.moments[gate] / sums.tokens).cpu()
            try:
                found[second], found[first] = best_low_rank(
                    source.read(second).double()[rows],
                    source.read(first).double(),
                    moment,
                    len(kept[space.name][0]),
                )
            except ValueError as error:
                raise UserError(f"gates of layer {space.layer}: {first_line(error)}") from error
    return found


def refit_note(refitted: Mapping[str, Tensor]) -> list[str]:
    """What a user must know of refitted gates; nothing if there are none."""
    if not refitted:
        return []
    return [
        f"{len(refitted) // 2} low-rank gates have the head's width inside: they are fitted anew "
        "to the narrower one, so their optimizer moments begin anew"
    ]


def _rows(name: str, spaces: Iterable[Space], kept: Mapping[str, Kept]) -> Tensor:
    """Which rows of a gate's second projection survive all planned spaces."""
    masks = [
        survives(axis, kept[space.name])
        for space in spaces
        for axis in space.axes
        if axis.fqn == name and axis.dim == 0
    ]
    return torch.stack(masks).all(0).nonzero().squeeze(-1)
