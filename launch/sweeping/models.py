"""A sweep over several models, as a TOML file describes it.

    out = "runs/small/sweep"
    methods = ["drrqr:paper", "output-error:repair=output", "random"]
    ratios = [0.25, 0.5, 0.75]
    reference = "drrqr:paper"
    max_sequences = 96

    [[models]]
    model = "runs/small/gated_deltanet-0"
    group = "GatedDeltaNet"

Every key but `out` and `models` is an option of `slimstate sweep`. A model's `name` is by default
the last part of its reference, and its `group`, with whose models it is averaged, its name. The
sweep of each model lies in OUT/NAME.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flame.errors import UserError
from flame.options import Entry
from flame.process.output_checks import check_place, is_marked_or_new, mark_as_made
from flame.storage.toml_file import read_toml
from launch.sweeping.folder import PAGE_FILE, RESULTS_FILES, SETTINGS_FILE

OWN = ("out", "models")
NAME = re.compile(r"[\w+-][\w.+-]*")
OF_A_MODEL = ("model", "name", "group")
INPUTS = ("recover", "stats")
"""Options that are files, which may lie beside the TOML."""


@dataclass(frozen=True)
class Model:
    """One model of a sweep."""

    model: str
    """A reference, as every command takes it."""

    name: str
    """Unique in the sweep; names its folder in it."""

    group: str
    """Models of one group are averaged, such as the seeds of one kind of model."""


@dataclass(frozen=True)
class SweepFile:
    """What the TOML of a sweep says."""

    out: str
    models: tuple[Model, ...]
    words: tuple[str, ...]
    """The other keys, as options of `slimstate sweep`."""


def read_sweep_file(path: Path, options: Sequence[Entry]) -> SweepFile:
    """Read a sweep's TOML.

    Args:
        path: the file.
        options: the options of `slimstate sweep`, whose names are the keys.

    Raises:
        UserError: a key is unknown or lacks, a value is of the wrong kind, a model is not
            described, or two have one name.
    """
    tables = read_toml(path, "sweep")
    known = {entry.flag.removeprefix("--"): entry for entry in options}
    found = {key.replace("_", "-"): value for key, value in tables.items()}
    for key in found:
        _check_known(f"{path}", key, [*OWN, *known])
    for key in OWN:
        if not found.get(key):
            raise UserError(f"{path} has no {key}: see slimstate recipes --show small_sweep")
    words = (word for k, v in found.items() if k in known for word in _words(path, known[k], v))
    return SweepFile(str(found["out"]), _models(path, found["models"]), tuple(words))


def _words(path: Path, entry: Entry, value: Any) -> list[str]:
    """The command-line words of a key with a value."""
    if entry.kind is bool:
        if not isinstance(value, bool):
            raise UserError(f"{path}: {entry.name} is true or false, not {value!r}")
        return [entry.flag] if value else []
    values = value if isinstance(value, list) else [value]
    if not values or any(isinstance(each, bool | dict | list) for each in values):
        raise UserError(f"{path}: {entry.name} is a value or a list of values, not {value!r}")
    texts = [str(each) for each in values]
    if entry.name in INPUTS and (path.parent / texts[0]).exists():
        texts[0] = str(path.parent / texts[0])
    return [entry.flag, ",".join(texts)]


def _models(path: Path, tables: Any) -> tuple[Model, ...]:
    if not isinstance(tables, list) or not all(isinstance(each, dict) for each in tables):
        raise UserError(f"{path}: models is a list of tables: write [[models]] before each")
    found: dict[str, Model] = {}
    for table in tables:
        made = _model(path, table)
        if made.name in found:
            raise UserError(
                f"{path}: {found[made.name].model} and {made.model} are both called {made.name}: "
                "give one of them another name"
            )
        found[made.name] = made
    return tuple(found.values())


def _model(path: Path, table: Mapping[str, Any]) -> Model:
    for key, value in table.items():
        _check_known(f"{path}: [[models]]", key, OF_A_MODEL)
        if not isinstance(value, str) or not value:
            raise UserError(f"{path}: [[models]]: {key} is text, not {value!r}")
    if "model" not in table:
        raise UserError(f"{path}: [[models]] {dict(table)} names no model: add model = …")
    name = table.get("name") or Path(table["model"]).name
    if not NAME.fullmatch(name):
        raise UserError(f"{path}: {name!r} cannot name a folder: give the model another name")
    return Model(table["model"], name, table.get("group") or name)


def _check_known(where: str, key: str, known: Sequence[str]) -> None:
    if key not in known:
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(known)}"
        raise UserError(f"{where}: unknown key {key}: {hint}")


def check_place_of(out: Path, models: Sequence[Model]) -> None:
    """Raise UserError if the sweeps of models cannot lie in the folder `out`."""
    if not models:
        return
    check_place(out)
    if out.exists() and not out.is_dir():
        raise UserError(f"output {out} is a file: choose a folder")
    if (out / SETTINGS_FILE).exists():
        raise UserError(f"{out} is the sweep of one model: choose another folder")
    if not is_marked_or_new(out):
        raise UserError(f"{out} is not empty and no sweep: choose another folder")


def begin(out: Path, models: Sequence[Model]) -> None:
    """Make the folder of the sweeps of models. One process does it alone."""
    if models:
        out.mkdir(parents=True, exist_ok=True)
        mark_as_made(out, [*(each.name for each in models), PAGE_FILE, *RESULTS_FILES])
