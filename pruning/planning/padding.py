"""Padding: a stock checkpoint for widths that differ between layers or heads.

Every head gets the largest width of its kind. The channels that fill it up are some of those that
the plan drops, as zeros: so their positions are the layout's, whatever it is. A key or value
channel whose rows are all zero adds nothing to any output, and its gradients are zero as well, so
it stays zero in training; so does a head whose output columns are zero too.

The output norm divides by the number of value channels, padding included, which its weight takes
back (`pruning.transform.slices`).
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from flame.errors import UserError
from pruning.spaces import Kept, Space, widths_of


def padded(spaces: Iterable[Space], kept: Mapping[str, Kept]) -> dict[str, Kept]:
    """`kept`, filled up in each head with the first dropped channels to its kind's largest width.

    Args:
        spaces: the model's.
        kept: a selection for each planned space.
    """
    planned = [space for space in spaces if space.name in kept]
    widths = widths_of(planned, kept)
    most = {
        kind: max(max(widths[space.name]) for space in planned if space.kind == kind)
        for kind in {space.kind for space in planned}
    }
    return {
        space.name: tuple(
            _filled(row, most[space.kind], space.head_dim) for row in kept[space.name]
        )
        for space in planned
    }


def check_padding(config: Mapping[str, object], spaces: Iterable[Space], kept: Mapping) -> None:
    """Raise UserError if heads of zeros, which a padded model would have, have no finite output."""
    heads = {len(kept[s.name][0]) for s in spaces if s.kind == "head" and s.name in kept}
    if len(heads) > 1 and config.get("qk_norm") == "sum":
        raise UserError(
            "--pad fills layers up with heads of zeros, which qk_norm 'sum' cannot divide by their "
            "sum: leave --pad out, or use --allocate uniform for heads"
        )


def _filled(row: Tensor, width: int, head_dim: int) -> Tensor:
    # A row that is longer is of a head that goes as a whole.
    dropped = torch.ones(head_dim, dtype=torch.bool)
    dropped[row] = False
    return torch.cat([row, dropped.nonzero().squeeze(-1)])[:width].sort().values
