"""Plans: which channels of a model are kept, and by what they were chosen.

What a plan is, and whether it fits a model; `pruning.planning.plan_file` writes and reads it.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from flame.checkpoint.fingerprint import canonical_config
from flame.errors import UserError, first_line
from pruning.adapters import TIED_KINDS, Adapter, adapter_for
from pruning.adapters.interface import Config
from pruning.planning.new_tensors import NewTensors
from pruning.planning.padding import check_padding, padded
from pruning.repair.gates import refits
from pruning.spaces import Kept, Kind, Space, check_kept, widths_of


@dataclass(frozen=True)
class TensorsFile:
    """The safetensors file beside a plan with tensors that take the place of sliced ones."""

    name: str
    """Its name, in the plan's folder."""
    hash: str
    """Its XXH3 hash of 128 bits, in hexadecimal digits."""


@dataclass(frozen=True)
class Plan:
    """What the transform needs beside the checkpoint, and a record of how it came about."""

    method: str
    """Name of the method that chose."""
    options: dict[str, Any]
    """The method's hyper-parameters."""
    budget: dict[str, Any]
    """Ratio, multiple and kind of space, as asked for."""
    fingerprint: str
    """Of the source model (`flame.checkpoint.fingerprint`)."""
    config_before: Config
    """The source's config.json."""
    config_after: Config
    """The pruned model's."""
    kept: dict[str, Kept]
    """Channels to keep of each head of each space, by the space's name."""
    calibration: dict[str, Any] | None
    """Data, tokens, sequences, sequence length and seed; None if no data was read."""
    versions: dict[str, str]
    """Of the programs that made the plan."""
    tensors_file: TensorsFile | None = None
    """Where the new tensors are, if the method or a repair made any and they are saved."""
    pad: bool = False
    """Whether heads are filled up with zeros to the largest width, for a stock model."""
    undo_gain: bool = False
    """Whether the pruned model gives what zeros in the dropped channels would, not a larger output
    as published (`pruning.planning.gain`)."""
    repair: dict[str, Any] | None = None
    """How tensors that stay were fitted anew (`pruning.repair`), and on which data; None if none
    were."""
    notes: tuple[str, ...] = ()
    """What a user must know of the choice, such as that a projection is approximate."""
    new_tensors: NewTensors = field(default_factory=dict, repr=False, compare=False)
    """The same before they are saved, by name: `with_saved_tensors` writes them to a file."""

    @property
    def widths(self) -> dict[str, tuple[int, ...]]:
        """How many channels each head keeps, by the space's name."""
        return {name: tuple(map(len, kept)) for name, kept in self.kept.items()}


def check_plan(plan: Plan, config: Config, name: str = "the plan") -> None:
    """Raise UserError unless `plan` fits a model of this config; reads no weights.

    Args:
        plan: as read from a file.
        config: the model's config.json.
        name: what to call the plan in messages, such as its path.
    """
    if canonical_config(plan.config_before) != canonical_config(config):
        differing = _differing(plan.config_before, config)
        raise UserError(
            f"{name} is of another model ({differing}): apply it to the model that it was made "
            "from, or make a new plan"
        )
    try:
        spaces = planned_spaces(plan, config)
        for space in spaces:
            check_kept(space, plan.kept[space.name])
        if refits(spaces) and not (plan.tensors_file or plan.new_tensors):
            raise ValueError("it has no new tensors for the low-rank gates, which become narrower")
        resized = pruned_config(plan.config_before, plan.kept, plan.pad, plan.undo_gain)
    except ValueError as error:
        raise UserError(f"{name} does not fit the model: {first_line(error)}") from error
    if resized != plan.config_after:
        raise UserError(
            f"{name} was edited: its config_after does not follow from its spaces: make a new plan"
        )


def pruned_config(
    config: Config, kept: Mapping[str, Kept], pad: bool = False, undo_gain: bool = False
) -> Config:
    """The config of a model of which `kept` is kept, or of its padded form.

    Args:
        config: the dense model's.
        kept: a selection for each planned space.
        pad, undo_gain: as in `Plan`.

    Raises:
        UserError: the model cannot be padded.
        ValueError: no config describes the result.
    """
    adapter = adapter_for(config)
    spaces = adapter.spaces(config)
    if pad:
        check_padding(config, spaces, kept)
        kept = padded(spaces, kept)
    return adapter.resize(config, widths_of(spaces, kept), undo_gain)


def with_padding(plan: Plan) -> Plan:
    """`plan` with a stock model as its result, whose extra channels are zero."""
    config = pruned_config(plan.config_before, plan.kept, True, plan.undo_gain)
    return replace(plan, pad=True, config_after=config)


def check_fingerprint(plan: Plan, fingerprint: str, name: str = "the plan") -> None:
    """Raise UserError unless `plan` was made from the model of this fingerprint."""
    if plan.fingerprint != fingerprint:
        raise UserError(
            f"{name} is of another model (fingerprint {plan.fingerprint[:12]}, this model's is "
            f"{fingerprint[:12]}): apply it to the model that it was made from, or make a new plan"
        )


def planned_spaces(plan: Plan, config: Config) -> list[Space]:
    """The spaces of the model that `plan` prunes; ValueError if it names one the model lacks."""
    spaces = {space.name: space for space in adapter_for(config).spaces(config)}
    unknown = sorted(set(plan.kept) - set(spaces))
    if unknown:
        raise ValueError(f"the model has no space {unknown[0]!r}: it has {_range(list(spaces))}")
    return [space for name, space in spaces.items() if name in plan.kept]


def spaces_of_kinds(adapter: Adapter, config: Config, kinds: Iterable[Kind]) -> list[Space]:
    """The spaces of the model that are of these kinds; UserError if it has none of one."""
    spaces, kinds = adapter.spaces(config), tuple(kinds)
    available = {space.kind for space in spaces}
    for kind in kinds:
        if kind not in available:
            reason = TIED_KINDS.get((adapter.model_type, kind))
            if reason is None and kind == "value-head":
                reason = "each of its key heads serves one value head"
            raise UserError(
                f"no space of kind {kind!r} can be pruned in a {adapter.model_type} model"
                f"{f', because {reason}' if reason else ''}: choose from "
                f"{', '.join(sorted(available)) or 'none'}"
            )
    return [space for space in spaces if space.kind in kinds]


def options_of(method: Any) -> dict[str, Any]:
    """The hyper-parameters of a method, by name."""
    return {field.name: getattr(method, field.name) for field in fields(method)}


def _differing(one: Config, other: Config) -> str:
    """What differs between two models' configs: their families, or up to three keys with values."""
    one, other = (json.loads(canonical_config(config)) for config in (one, other))
    keys = sorted(key for key in {*one, *other} if one.get(key) != other.get(key))
    shown = ["model_type"] if "model_type" in keys else keys[:3]
    return ", ".join(f"{key} {one.get(key)} there, {other.get(key)} here" for key in shown)


def _range(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}" if names else "none"
