"""Plans as files: JSON that can be compared by `diff` and written by hand.

Keys are sorted, one space a line, and no number was computed from data in floating point, but for
two digits of a divergence in notes (`pruning.damage.gain`), so the same inputs give the same bytes
at every world size. Everything is checked when it is read. Where a
method changes tensors beyond keeping channels, the new ones lie beside the plan in a safetensors
file that the plan names with its hash.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from flame.errors import UserError, first_line
from flame.storage.checksums import hash_file
from flame.storage.json_file import read_object
from flame.storage.safetensors_file import DTYPES, SafetensorsFile, write_safetensors
from pruning.planning.new_tensors import Later, made
from pruning.planning.plan import Plan, TensorsFile
from pruning.spaces import Kept

FORMAT = 1
"""Version of the format; a plan of a newer one is refused."""

PLAN_FILE = "plan.json"
"""Name of the plan that an output folder keeps."""

TENSORS_FILE = "plan.tensors.safetensors"
"""Name of the file with its new tensors, if it has any."""


def plan_text(plan: Plan) -> str:
    """`plan` as the text of its file."""
    saved = plan.tensors_file
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
        "repair": plan.repair,
        "replaced": {"file": saved.name, "hash": saved.hash} if saved else None,
        "undo_gain": plan.undo_gain,
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
    content = read_object(path, object_pairs_hook=_without_duplicates, parse_constant=_no_constant)
    try:
        return _plan(content)
    except ValueError as error:
        raise UserError(f"plan {path}: {first_line(error)}") from error


def _plan(content: dict[str, Any]) -> Plan:
    if "spaces" not in content:
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
        tensors_file=_tensors_file(_optional(content, "replaced")),
        pad=_flag(content, "pad"),
        undo_gain=_flag(content, "undo_gain"),
        repair=_optional(content, "repair"),
        notes=_notes(content.get("notes", [])),
    )


def with_saved_tensors(plan: Plan, file: Path, name: str = "") -> Plan:
    """`plan` with its new tensors written to the safetensors file `file`, which will be `name`."""
    new = plan.new_tensors
    forms = {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in new.items()}
    write_safetensors(file, forms, lambda key: made(new[key]))
    saved = TensorsFile(name or file.name, hash_file(file))
    return replace(plan, tensors_file=saved, new_tensors={})


def with_loaded_tensors(plan: Plan, folder: Path) -> Plan:
    """`plan`, which was read from a file in `folder`, with new tensors that are read when needed.

    Raises:
        UserError: their file is missing, or not the one that the plan was made with.
    """
    if plan.tensors_file is None:
        return plan
    tensors = SafetensorsFile(checked_tensors(plan.tensors_file, folder))
    loaded = {
        name: Later(entry.shape, DTYPES[entry.code], partial(tensors.get_tensor, name))
        for name, entry in tensors.entries.items()
    }
    return replace(plan, tensors_file=None, new_tensors=loaded)


def checked_tensors(file: TensorsFile, folder: Path) -> Path:
    """Where a plan's new tensors are; UserError if they are missing or others than the plan's."""
    path = folder / file.name
    if not path.is_file():
        raise UserError(f"the plan replaces tensors by those of {path}, which is missing")
    if hash_file(path) != file.hash:
        raise UserError(f"{path} is not the file that the plan was made with (its hash differs)")
    return path


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


def _tensors_file(content: dict[str, Any] | None) -> TensorsFile | None:
    if content is None:
        return None
    file = _get(content, "file", str)
    if Path(file).name != file:
        raise ValueError(f"replaced tensors are in {file!r}, expected the name of a file beside it")
    return TensorsFile(file, _get(content, "hash", str))


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


def _short(value: Any) -> str:
    text = "missing" if value is None else repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
