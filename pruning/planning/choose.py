"""Choosing: a method and a budget, applied to every space of a model, make a plan."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flame.checkpoint.fingerprint import fingerprint, is_finite
from flame.checkpoint.source import TensorSource
from flame.errors import UserError, first_line
from flame.models.widths import SHAPES
from flame.process.progress import progress
from flame.versions import versions
from pruning.adapters import adapter_for
from pruning.adapters.interface import Config
from pruning.methods import Method
from pruning.planning.allocation import groups, in_units_of_loss, shared_widths
from pruning.planning.applicable import check_floor, check_method
from pruning.planning.budgets import Budget, departures, kept_heads, uniform_widths
from pruning.planning.gain import gain_notes, why_kept
from pruning.planning.plan import Plan, options_of, pruned_config, spaces_of_kinds
from pruning.planning.tied import check_one_width, check_tied
from pruning.repair.gates import needs_of, refit_note, refitted_gates
from pruning.spaces import OF_KEY_HEADS, Axis, Kept, Kind, Space
from pruning.statistics import Statistic

SpaceStatistics = Mapping[str, Mapping[type[Statistic], Statistic]]
"""Statistics by the space's name and their type."""


def check_budget(budget: Budget, config: Config, method: Method | None = None) -> dict[Kind, int]:
    """What each kind keeps a head under `budget`, before scores share it out.

    Raises:
        UserError: the model has no such space, none changes, the method cannot do it, or the
            ratio is missed and `budget` is strict.
    """
    adapter = adapter_for(config)
    spaces = spaces_of_kinds(adapter, config, budget.kinds)
    check_tied(budget, adapter)
    widths = uniform_widths(budget, adapter, config, spaces)
    check_one_width(adapter, widths)
    for line in departures(budget, spaces, widths) if budget.strict_ratio else ():
        raise UserError(f"--strict-ratio: {line}")
    if budget.pad and budget.allocate == "uniform":
        raise UserError(
            "--pad is for heads of different widths, which --allocate layer, model or auto makes: "
            "leave it out, or say --allocate"
        )
    check_floor(budget, widths)
    if method is not None:
        check_method(budget, method, spaces)
    if budget.allocate != "uniform" and not budget.pad:
        _check_slim_class(budget, adapter.model_type)
    return widths


def ratio_notes(budget: Budget, config: Config, widths: Mapping[Kind, int]) -> list[str]:
    """Lines about widths, those of `check_budget`, that are far from the ratio asked for."""
    return list(
        departures(budget, spaces_of_kinds(adapter_for(config), config, budget.kinds), widths)
    )


def choose(
    config: Config,
    source: TensorSource,
    method: Method,
    budget: Budget,
    statistics: SpaceStatistics | None = None,
    calibration: dict[str, Any] | None = None,
    damage: Mapping[str, float] | None = None,
) -> Plan:
    """The plan of `method` within `budget`. One process does it alone.

    Weights are read space by space, so memory holds the tensors of one space, and the new tensors
    of a method that makes some.

    Args:
        config: the model's config.json.
        source: its tensors.
        method: chooses the channels of each space.
        budget: how many channels.
        statistics: what the method needs, for every space; None if it needs nothing.
        calibration: what the plan records of the data behind the statistics.
        damage: of each space pruned alone to the uniform widths, by its name, in one unit that the
            scores are to have where they share channels; None for the method's own.

    Raises:
        UserError: the budget or method does not fit the model, a tensor that the method sees has
            NaN or infinite values, or the method finds no answer.
    """
    uniform = check_budget(budget, config, method)
    adapter = adapter_for(config)
    spaces = spaces_of_kinds(adapter, config, budget.kinds)
    chooser = _Chooser(source, method, statistics or {}, damage)
    kept: dict[str, Kept] = {}
    new_tensors: dict[str, Tensor] = {}
    # Heads first: channels are then shared out among those that stay.
    first = [space for space in spaces if space.kind == "head"]
    for part in (first, [space for space in spaces if space.kind != "head"]):
        widths = chooser.widths(part, uniform, budget, _staying(first, kept))
        for space in progress(part, f"choose ({method.name})", len(part)):
            kept[space.name], new = chooser.choose(space, widths[space.name])
            new_tensors |= new
    refitted = refitted_gates(spaces, kept, source, statistics or {})
    new_tensors |= refitted
    undo_gain = adapter.can_undo_gain and not budget.keeps_gain
    return Plan(
        method=method.name,
        options=options_of(method),
        budget=budget.record(),
        fingerprint=fingerprint(config, source),
        config_before=config,
        config_after=pruned_config(config, kept, budget.pad, undo_gain),
        kept=kept,
        calibration=calibration if needs_of(method, spaces) else None,
        versions=versions(("slimstate", "torch")),
        pad=budget.pad,
        undo_gain=undo_gain,
        notes=(
            *([budget.fitted] if budget.fitted else []),
            *departures(budget, spaces, uniform),
            *_notes(method, config, budget.kinds),
            *refit_note(refitted),
            *([] if undo_gain else gain_notes(spaces, kept, budget.pad, why_kept(budget, config))),
        ),
        new_tensors=new_tensors,
    )


@dataclass(frozen=True)
class _Chooser:
    """A method with the weights and sums that it sees."""

    source: TensorSource
    method: Method
    statistics: SpaceStatistics
    damage: Mapping[str, float] | None

    def widths(
        self,
        spaces: list[Space],
        uniform: Mapping[Kind, int],
        budget: Budget,
        staying: Mapping[int, Tensor],
    ) -> dict[str, tuple[int, ...]]:
        """What each head of each space keeps; heads that go as a whole take no part in sharing.

        Args:
            spaces, uniform, budget: as in `choose`.
            staying: the heads that stay, by layer, where some go.
        """
        if budget.allocate == "uniform":
            return {space.name: (uniform[space.kind],) * space.num_heads for space in spaces}
        found: dict[str, tuple[int, ...]] = {}
        for group in groups(spaces, budget.allocate):
            kind = group[0].kind
            multiple = budget.multiple(kind, group[0].head_dim)
            taking_part = {space.name: _taking_part(space, staying) for space in group}
            scores = {space.name: self._scores(space)[taking_part[space.name]] for space in group}
            if self.damage is not None:
                scores = in_units_of_loss(scores, uniform[kind], self.damage)
            total = sum(map(len, scores.values())) * uniform[kind]
            if kind == "head" and budget.ratio is not None:
                total = kept_heads(budget, sum(space.head_dim for space in group))
            least = 1 if kind == "head" else budget.floor or 1
            shares = shared_widths(scores, max(total, len(group)), multiple, least)
            for space in group:
                widths = torch.full((space.num_heads,), uniform[kind])
                widths[taking_part[space.name]] = torch.tensor(shares[space.name])
                found[space.name] = tuple(widths.tolist())
        return found

    def choose(self, space: Space, widths: tuple[int, ...]) -> tuple[Kept, dict[str, Tensor]]:
        """The channels that each head keeps, and the tensors that the method makes of them."""
        weights, sums = self._seen(space)
        make = getattr(self.method, "new_tensors", None)
        with _named(self.method, space):
            chosen = {k: self.method.select(space, k, weights, sums).cpu() for k in set(widths)}
            new = make(space, widths, weights, sums) if make is not None else {}
        return tuple(chosen[k][head] for head, k in enumerate(widths)), new

    def _scores(self, space: Space) -> Tensor:
        weights, sums = self._seen(space)
        with _named(self.method, space):
            scores: Tensor = self.method.scores(space, weights, sums)  # type: ignore[attr-defined]
            if not bool(scores.isfinite().all()):
                raise ValueError("the scores hold a NaN or an infinity")
        return scores

    def _seen(self, space: Space) -> tuple[dict[str, Tensor], Mapping[type[Statistic], Statistic]]:
        weights = {axis.fqn: _weight(self.source, axis) for axis in space.axes}
        return weights, self.statistics.get(space.name, {})


def _staying(spaces: list[Space], kept: Mapping[str, Kept]) -> dict[int, Tensor]:
    """The heads that stay, by layer, of the head spaces that have been chosen from."""
    return {space.layer: kept[space.name][0] for space in spaces if space.name in kept}


def _taking_part(space: Space, staying: Mapping[int, Tensor]) -> Tensor:
    if space.kind in OF_KEY_HEADS and space.layer in staying:
        return staying[space.layer]
    return torch.arange(space.num_heads)


@contextmanager
def _named(method: Method, space: Space) -> Iterator[None]:
    """Complaints of the method, as those of a person's model and options."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{method.name} on {space.name}: {first_line(error)}") from error


def _check_slim_class(budget: Budget, family: str) -> None:
    if f"slim_{family}" not in SHAPES:
        raise UserError(
            f"--allocate {budget.allocate} makes widths that differ between heads, and {family} "
            "has no class for that: add --pad for a stock model with channels of zeros, or use "
            "--allocate uniform"
        )


def _notes(method: Method, config: Config, kinds: tuple[Kind, ...]) -> list[str]:
    notes = getattr(method, "notes", None)
    return [] if notes is None else list(notes(config, kinds))


def _weight(source: TensorSource, axis: Axis) -> Tensor:
    shape = source.info(axis.fqn).shape
    if shape[axis.dim : axis.dim + 1] != (axis.layout.size,):
        raise UserError(f"{axis.fqn} has shape {shape}, which config.json does not lead to")
    weight = source.read(axis.fqn).float()
    check_tensor_finite(axis.fqn, weight)
    return weight


def check_tensor_finite(name: str, tensor: Tensor) -> None:
    """Raise UserError if `tensor` has NaN or infinite values."""
    if not is_finite(tensor):
        raise UserError(
            f"{name} holds NaN or infinite values: choose a checkpoint from before training "
            "diverged"
        )
