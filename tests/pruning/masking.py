"""A dense model made to compute what its pruned form computes: the reference of exactness tests."""

import copy
import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from pruning.adapters import ADAPTERS
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


def mask(model: nn.Module, spaces: list[Space], kept: Mapping[str, Kept]) -> None:
    """Zero what `kept` drops in all projections, and restrict the output norms to what stays."""
    parameters = dict(model.named_parameters())
    for space in spaces:
        for axis in space.axes:
            dropped = dropped_positions(axis, kept[space.name])
            if axis.role == "projection":
                parameters[axis.fqn].data.index_fill_(axis.dim, dropped, 0)
            elif axis.role == "norm":
                parent, name = axis.fqn.removesuffix(".weight").rsplit(".", 1)
                module = model.get_submodule(parent)
                setattr(module, name, KeptNorm(getattr(module, name), kept[space.name][0]))


@contextmanager
def scale_of(config: dict[str, Any], head_dim: int) -> Iterator[None]:
    """Let the layers call their operator with the scale of `head_dim` channels."""
    patches = []
    for module_name, attribute in ADAPTERS[config["model_type"]].op_sites:
        module = importlib.import_module(module_name)
        op = partial(getattr(module, attribute), scale=head_dim**-0.5)
        patches.append(patch.object(module, attribute, op))
    for each in patches:
        each.start()
    try:
        yield
    finally:
        for each in patches:
            each.stop()


def difference(one: Tensor, other: Tensor) -> float:
    """The largest difference in units of the largest entry."""
    return float((one - other).abs().max() / other.abs().max())
