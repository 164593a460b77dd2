"""Choosing: a method and a budget, applied to every space of a model, make a plan."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from flame.checkpoint.fingerprint import fingerprint
from flame.checkpoint.source import TensorSource
from flame.errors import UserError, first_line
from flame.progress import progress
from pruning.adapters import adapter_for
from pruning.adapters.interface import Config
from pruning.budgets import MULTIPLE_OF, uniform_widths
from pruning.methods import Method
from pruning.plan import Plan, options_of, pruned_config, spaces_of_kind, versions
from pruning.spaces import Axis, Kept, Space, rows
from pruning.statistics import Statistic

SpaceStatistics = Mapping[str, Mapping[type[Statistic], Statistic]]
"""Statistics by the space's name and their type."""


@dataclass(frozen=True)
class Budget:
    """How much of what to remove; the same width everywhere."""

    ratio: float
    """The part of the channels to remove."""
    multiple_of: int = MULTIPLE_OF
    """Widths are multiples of this."""
    space: str = "key"
    """Kind of the spaces to prune."""


def check_budget(budget: Budget, config: Config) -> dict[str, int]:
    """The width of each space under `budget`; UserError if the model has none or none changes."""
    adapter = adapter_for(config)
    spaces = spaces_of_kind(adapter, config, budget.space)
    return uniform_widths(spaces, budget.ratio, budget.multiple_of)


def choose(
    config: Config,
    source: TensorSource,
    method: Method,
    budget: Budget,
    statistics: SpaceStatistics | None = None,
    calibration: dict[str, Any] | None = None,
) -> Plan:
    """The plan of `method` within `budget`. One process does it alone.

    Weights are read space by space, so memory holds the tensors of one space.

    Args:
        config: the model's config.json.
        source: its tensors.
        method: chooses the channels of each space.
        budget: how many channels.
        statistics: what the method needs, for every space; None if it needs nothing.
        calibration: what the plan records of the data behind the statistics.

    Raises:
        UserError: a tensor that the method sees has NaN or infinite values, or the method finds
            no answer.
    """
    widths = check_budget(budget, config)
    adapter = adapter_for(config)
    spaces = spaces_of_kind(adapter, config, budget.space)
    kept = {
        space.name: _select(space, widths[space.name], source, method, statistics or {})
        for space in progress(spaces, f"choose ({method.name})", len(spaces))
    }
    return Plan(
        method=method.name,
        options=options_of(method),
        budget=asdict(budget),
        fingerprint=fingerprint(config, source),
        config_before=config,
        config_after=pruned_config(config, kept),
        kept=kept,
        calibration=calibration if method.needs else None,
        versions=versions(),
    )


def _select(
    space: Space, k: int, source: TensorSource, method: Method, statistics: SpaceStatistics
) -> Kept:
    weights = {axis.fqn: _weight(source, axis) for axis in space.axes}
    try:
        return rows(method.select(space, k, weights, statistics.get(space.name, {})))
    except ValueError as error:
        raise UserError(f"{method.name} on {space.name}: {first_line(error)}") from error


def _weight(source: TensorSource, axis: Axis) -> Tensor:
    shape = source.info(axis.fqn).shape
    if shape[axis.dim : axis.dim + 1] != (axis.layout.size,):
        raise UserError(f"{axis.fqn} has shape {shape}, which config.json does not lead to")
    weight = source.read(axis.fqn).float()
    check_tensor_finite(axis.fqn, weight)
    return weight


def check_tensor_finite(name: str, tensor: Tensor) -> None:
    """Raise UserError if `tensor` has NaN or infinite values."""
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise UserError(
            f"{name} holds NaN or infinite values: choose a checkpoint from before training "
            "diverged"
        )
