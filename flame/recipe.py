"""Recipes as TOML: reading, filling in and writing them, without torchtitan.

Stages that do not train read recipes here. `flame.config` has the sections as torchtitan's job
configuration, whose import takes seconds.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flame.data.config import DataConfig
from flame.errors import UserError
from flame.storage.toml_file import read_toml

ALWAYS_WRITTEN = ("data.", "training.seq_len", "training.steps", "training.local_batch_size")
"""Beginnings of the keys that a written recipe names even if they have their default."""


def recipe_path(arguments: Sequence[str]) -> Path | None:
    """Return the recipe that `--job.config_file` of a command line of `train` names, if any."""
    for position, argument in enumerate(arguments):
        if option_name(argument) == "job.config_file":
            value = argument.partition("=")[2] or "".join(arguments[position + 1 : position + 2])
            return Path(value)
    return None


def option_name(argument: str) -> str:
    """Return `section.key` of an argument `--section.key` or `--section.key=value`."""
    return argument.partition("=")[0].replace("-", "_").lstrip("_")


def read_tables(path: Path | None) -> dict[str, Any]:
    """Return the tables of a recipe file; none if `path` is None, for a model without a recipe.

    Raises:
        UserError: the file cannot be read, is not TOML, or holds a key outside any section.
    """
    tables = {} if path is None else read_toml(path, "recipe")
    for name, value in tables.items():
        if not isinstance(value, dict):
            raise UserError(f"recipe key {name} is not a section: write [{name}]")
    return tables


def data_config(tables: dict[str, Any]) -> DataConfig:
    """Return the `[data]` section of a recipe's tables; raise `UserError` if it is wrong."""
    config = DataConfig()
    fill(config, "data", tables.get("data", {}))
    return config


def sequence_length(tables: dict[str, Any]) -> int | None:
    """Return `training.seq_len` of a recipe's tables, None if it is not there."""
    length = tables.get("training", {}).get("seq_len")
    return length if type(length) is int and length > 0 else None


def fill(section: Any, name: str, values: Any) -> None:
    """Set the fields of a section, a dataclass, from the table called `name` of a recipe.

    Raises:
        UserError: `values` is not a table, or has an unknown key or a value of another type.
    """
    if not isinstance(values, dict):
        raise UserError(f"recipe key {name} is not a section: write [{name}]")
    for key, value in values.items():
        if not hasattr(section, key):
            raise UserError(f"recipe key {name}.{key} is unknown: {known_fields(type(section))}")
        default = getattr(section, key)
        if dataclasses.is_dataclass(default):
            fill(default, f"{name}.{key}", value)
            continue
        if isinstance(default, float) and type(value) is int:
            value = float(value)
        if default is not None and type(value) is not type(default):
            expected = type(default).__name__
            raise UserError(f"recipe key {name}.{key} is {value!r}: it takes a {expected}")
        setattr(section, key, value)


def known_fields(section: type) -> str:
    """Return the names of a section's fields, to be listed in an error."""
    return "choose from " + ", ".join(field.name for field in dataclasses.fields(section))


def recipe_text(job: Any) -> str:
    """Return a job configuration as TOML: what differs from the defaults, and data and batch."""
    lines: list[str] = []
    defaults = dataclasses.asdict(type(job)())
    for section, values in dataclasses.asdict(job).items():
        body = _table_lines(section, values, defaults.get(section, {}))
        if body:
            lines += [*body, ""]
    return "\n".join(lines)


def _table_lines(name: str, values: dict[str, Any], defaults: dict[str, Any]) -> list[str]:
    lines = [
        # JSON's strings, whole numbers, truth values and lists are also TOML; its infinity is not.
        f"{key} = {repr(value) if isinstance(value, float) else json.dumps(value)}"
        for key, value in values.items()
        if not isinstance(value, dict) and value is not None
        if value != defaults.get(key) or f"{name}.{key}".startswith(ALWAYS_WRITTEN)
    ]
    if lines:
        lines.insert(0, f"[{name}]")
    for key, value in values.items():
        if isinstance(value, dict):
            lines += _table_lines(f"{name}.{key}", value, defaults.get(key, {}))
    return lines
