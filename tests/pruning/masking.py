"""A dense model made to compute what its pruned form computes: the reference of exactness tests."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pruning.spaces import Kept, Space, dropped_positions


class KeptNorm(nn.Module):
    """A norm over the kept channels alone; the others come out as zeros."""

    def __init__(self, norm: nn.Module, kept: Tensor) -> None:
        super().__init__()
        self.kept, self.size = kept, len(norm.weight)
        self.inner = copy.deepcopy(norm)
        self.inner.weight = nn.Parameter(norm.weight[kept].detach().clone())

    def forward(self, x: Tensor, *gate: Tensor) -> Tensor:
        out = self.inner(x[..., self.kept], *(g[..., self.kept] for g in gate))
        return torch.zeros_like(x).index_copy(-1, self.kept, out)


def mask(
    model: nn.Module, spaces: list[Space], kept: Mapping[str, Kept], kept_norms: bool = False
) -> None:
    """Zero what `kept` drops in all projections.

    With `kept_norms` the output norms run over the kept channels alone, not over zeros too.
    """
    parameters = dict(model.named_parameters())
    for space in spaces:
        for axis in space.axes:
            dropped = dropped_positions(axis, kept[space.name])
            if axis.role == "projection":
                parameters[axis.fqn].data.index_fill_(axis.dim, dropped, 0)
            elif axis.role == "norm" and kept_norms:
                parent, name = axis.fqn.removesuffix(".weight").rsplit(".", 1)
                module = model.get_submodule(parent)
                setattr(module, name, KeptNorm(getattr(module, name), kept[space.name][0]))


def difference(one: Tensor, other: Tensor) -> float:
    """The largest difference in units of the largest entry."""
    return float((one - other).abs().max() / other.abs().max())
