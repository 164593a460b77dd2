"""Plans: which channels of a model are kept, and by what they were chosen.

A plan is JSON: keys sorted, one space a line, no number that was computed from data in floating
point. So the same inputs give the same bytes at every world size, two plans can be compared by
`diff`, and a plan may be written by hand: everything is checked when it is read. Where a method
changes tensors beyond keeping channels, the new ones lie beside the plan in a safetensors file that
the plan names with its hash.
"""

import importlib.metadata
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from flame.checkpoint.checksums import hash_file
from flame.checkpoint.fingerprint import canonical_config
from flame.errors import UserError, first_line
from pruning.adapters import TIED_KINDS, Adapter, adapter_for
from pruning.adapters.interface import Config
from pruning.padding import check_padding, padded
from pruning.spaces import Kept, Kind, Space, check_kept, widths_of

FORMAT = 1
"""Version of the format; a plan of a newer one is refused."""

PLAN_FILE = "plan.json"
"""Name of the plan that an output folder keeps."""

PROJECTED_FILE = "plan.tensors.safetensors"
"""Name of the file with its new tensors, if it has any."""


@dataclass(frozen=True)
class Replaced:
    """Tensors that take the place of sliced ones, in a safetensors file beside the plan."""

    file: str
    """Name of the file, in the plan's folder."""
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
    replaced: Replaced | None = None
    pad: bool = False
    """Whether heads are filled up with zeros to the largest width, for a stock model."""
    notes: tuple[str, ...] = ()
    """What a user must know of the choice, such as that a projection is approximate."""
    projected: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)
    """New tensors that no file holds yet; `with_saved_tensors` makes them `replaced`."""

    @property
    def widths(self) -> dict[str, tuple[int, ...]]:
        """How many channels each head keeps, by the space's name."""
        return {name: tuple(map(len, kept)) for name, kept in self.kept.items()}


def plan_text(plan: Plan) -> str:
    """`plan` as the text of its file."""
    replaced = plan.replaced
    content = {
        "budget": plan.budget,
        "calibration": plan.calibration,
        "config_after": plan.config_after,
        "config_before": plan.config_before,
        "fingerprint": plan.fingerprint,
        "format": FORMAT,
        "method": {"name": plan.method, "options": plan.options},
        "notes": list(plan.notes),
        "pad": plan.pad,
        "replaced": {"file": replaced.file, "hash": replaced.hash} if replaced else None,
        "spaces": {name: [row.tolist() for row in kept] for name, kept in plan.kept.items()},
        "versions": plan.versions,
    }
    lines = [f" {_json(key)}: {_entry(key, content[key])}" for key in sorted(content)]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def read_plan(path: Path) -> Plan:
    """The plan of a file; its form is checked, not yet whether it fits a model.

    Raises:
        UserError: the file is missing or not JSON, its format is newer, or a value in it is not
            what a plan has there.
    """
    path = Path(path)
    try:
        return parse_plan(path.read_text())
    except OSError as error:
        raise UserError(f"cannot read plan {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"plan {path} is not JSON: it is not text") from error
    except json.JSONDecodeError as error:
        raise UserError(f"plan {path} is not JSON: {first_line(error)}") from error
    except ValueError as error:
        raise UserError(f"plan {path}: {first_line(error)}") from error


def parse_plan(text: str) -> Plan:
    """The plan that `text` writes; ValueError if it is none."""
    content = json.loads(text, object_pairs_hook=_without_duplicates, parse_constant=_no_constant)
    if not isinstance(content, dict) or "spaces" not in content:
        raise ValueError("this is JSON but not a plan: it has no spaces")
    _check_format(content.get("format"))
    method = _get(content, "method", dict)
    return Plan(
        method=_get(method, "name", str),
        options=_get(method, "options", dict),
        budget=_get(content, "budget", dict),
        fingerprint=_get(content, "fingerprint", str),
        config_before=_get(content, "config_before", dict),
        config_after=_get(content, "config_after", dict),
        kept={n: _kept(n, rows) for n, rows in _get(content, "spaces", dict).items()},
        calibration=_optional(content, "calibration"),
        versions=_get(content, "versions", dict),
        replaced=_replaced(_optional(content, "replaced")),
        pad=_flag(content, "pad"),
        notes=_notes(content.get("notes", [])),
    )


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
        for space in planned_spaces(plan, config):
            check_kept(space, plan.kept[space.name])
        resized = pruned_config(plan.config_before, plan.kept, plan.pad)
    except ValueError as error:
        raise UserError(f"{name} does not fit the model: {first_line(error)}") from error
    if resized != plan.config_after:
        raise UserError(f"{name} was edited: its config_after does not follow from its spaces")


def pruned_config(config: Config, kept: Mapping[str, Kept], pad: bool = False) -> Config:
    """The config of a model of which `kept` is kept, or of its padded form.

    Raises:
        UserError: the model cannot be padded.
        ValueError: no config describes the result.
    """
    adapter = adapter_for(config)
    spaces = adapter.spaces(config)
    if pad:
        check_padding(config, spaces, kept)
        kept = padded(spaces, kept)
    return adapter.resize(config, widths_of(spaces, kept))


def with_padding(plan: Plan) -> Plan:
    """`plan` with a stock model as its result, whose extra channels are zero."""
    return replace(plan, pad=True, config_after=pruned_config(plan.config_before, plan.kept, True))


def with_saved_tensors(plan: Plan, file: Path, name: str = "") -> Plan:
    """`plan` with its new tensors written to the safetensors file `file`, which will be `name`."""
    tensors = {key: plan.projected[key].contiguous() for key in sorted(plan.projected)}
    save_file(tensors, file, metadata={"format": "pt"})
    replaced = Replaced(name or file.name, hash_file(file))
    return replace(plan, replaced=replaced, projected={})


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
            raise UserError(
                f"no space of kind {kind!r} can be pruned in a {adapter.model_type} model"
                f"{f', because {reason}' if reason else ''}: choose from "
                f"{', '.join(sorted(available)) or 'none'}"
            )
    return [space for space in spaces if space.kind in kinds]


def versions() -> dict[str, str]:
    """Versions of the programs that a plan depends on."""
    return {name: _version(name) for name in ("slimstate", "torch")}


def options_of(method: Any) -> dict[str, Any]:
    """The hyper-parameters of a method, by name."""
    return {field.name: getattr(method, field.name) for field in fields(method)}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, allow_nan=False)


def _entry(key: str, value: Any) -> str:
    if key != "spaces":
        return _json(value)
    lines = [f"  {_json(name)}: {_json(value[name])}" for name in sorted(value)]
    return "{\n" + ",\n".join(lines) + "\n }"


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(k for k in keys if keys.count(k) > 1)!r} occurs twice")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number that a plan may have")


def _check_format(found: Any) -> None:
    if type(found) is not int or found < 1:
        raise ValueError(f"format is {found!r}, expected {FORMAT}: this is not a plan")
    if found > FORMAT:
        raise ValueError(
            f"its format is {found}, this slimstate reads up to {FORMAT}: install a newer slimstate"
        )


def _get(content: Mapping[str, Any], key: str, kind: type) -> Any:
    if not isinstance(content.get(key), kind):
        what = "a text" if kind is str else "an object"
        raise ValueError(f"{key} is {_short(content.get(key))}, expected {what}")
    return content[key]


def _optional(content: Mapping[str, Any], key: str) -> dict[str, Any] | None:
    return None if content.get(key) is None else _get(content, key, dict)


def _replaced(content: dict[str, Any] | None) -> Replaced | None:
    if content is None:
        return None
    file = _get(content, "file", str)
    if Path(file).name != file:
        raise ValueError(f"replaced tensors are in {file!r}, expected the name of a file beside it")
    return Replaced(file, _get(content, "hash", str))


def _flag(content: Mapping[str, Any], key: str) -> bool:
    if type(content.get(key, False)) is not bool:
        raise ValueError(f"{key} is {_short(content[key])}, expected true or false")
    return bool(content.get(key, False))


def _notes(found: Any) -> tuple[str, ...]:
    if not isinstance(found, list) or not all(isinstance(note, str) for note in found):
        raise ValueError(f"notes is {_short(found)}, expected a list of sentences")
    return tuple(found)


def _kept(name: str, rows: Any) -> Kept:
    """The kept channels of a space, per head; range and number are checked against the model."""
    if not isinstance(rows, list) or not rows or not all(isinstance(row, list) for row in rows):
        raise ValueError(f"{name} is {_short(rows)}, expected one list of channels per head")
    for head, row in enumerate(rows):
        _check_row(f"{name}, head {head}", row)
    return tuple(torch.tensor(row, dtype=torch.int64) for row in rows)


def _check_row(where: str, row: list[Any]) -> None:
    if not row:
        raise ValueError(f"{where} keeps no channel")
    for channel in row:
        if type(channel) is not int or not 0 <= channel < 2**31:
            raise ValueError(f"{where}: {_short(channel)} is not a channel's number")
    for one, other in zip(row, row[1:], strict=False):
        if one == other:
            raise ValueError(f"{where}: channel {one} occurs twice")
        if one > other:
            raise ValueError(f"{where}: channel {other} comes after {one}: list them in order")


def _differing(one: Config, other: Config) -> str:
    """What differs between two models' configs: their families, or up to three keys with values."""
    one, other = (json.loads(canonical_config(config)) for config in (one, other))
    keys = sorted(key for key in {*one, *other} if one.get(key) != other.get(key))
    shown = ["model_type"] if "model_type" in keys else keys[:3]
    return ", ".join(f"{key} {one.get(key)} there, {other.get(key)} here" for key in shown)


def _short(value: Any) -> str:
    text = "missing" if value is None else repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _range(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}" if names else "none"
