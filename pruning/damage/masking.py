"""Masking: a dense model that computes what its pruned form will, with zeros in what is dropped.

Zeros in the projections of a channel or head take it out of every output, at the dense model's
scales: so a masked model equals the pruned one whose gain is undone (`pruning.planning.gain`).
No second model is held; what the zeros replace is kept aside and put back.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pruning.spaces import Kept, Space, dropped_positions


@contextmanager
def masked(model: nn.Module, spaces: Iterable[Space], kept: Mapping[str, Kept]) -> Iterator[None]:
    """Hold zeros in all that `kept` drops of `model`, plain or sharded, inside the `with` block.

    Every process changes its own rows. Spaces that `kept` lacks stay as they are.
    """
    parameters = dict(model.named_parameters())
    with ExitStack() as stack:
        for space in spaces:
            for axis in space.axes if space.name in kept else ():
                if axis.role == "projection":
                    dropped = dropped_positions(axis, kept[space.name])
                    stack.enter_context(_zeros(parameters[axis.fqn], axis.dim, dropped))
        yield


@contextmanager
@torch.no_grad()
def _zeros(parameter: Tensor, dim: int, positions: Tensor) -> Iterator[None]:
    local, at = parameter.detach(), positions
    if isinstance(parameter, DTensor):
        local = parameter.detach().to_local()
        if dim == 0:
            first = _first_row(parameter)
            at = positions - first
            at = at[(at >= 0) & (at < len(local))]
    at = at.to(local.device)
    before = local.index_select(dim, at)
    local.index_fill_(dim, at, 0)
    try:
        yield
    finally:
        local.index_copy_(dim, at, before)


def _first_row(parameter: DTensor) -> int:
    """The first of the whole tensor's rows that this process holds."""
    chunks = parameter.__create_chunk_list__()
    return chunks[0].offsets[0] if chunks else 0
