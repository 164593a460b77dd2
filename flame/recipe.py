"""Reading a run's recipe without torchtitan, for stages that do not train.

`flame.config` reads recipes into torchtitan's job configuration, whose import takes seconds.
"""

import dataclasses
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flame.data.config import DataConfig
from flame.errors import UserError, first_line


def recipe_path(arguments: Sequence[str]) -> Path | None:
    """The recipe that `--job.config_file` of a command line of `train` names."""
    for position, argument in enumerate(arguments):
        if option_name(argument) == "job.config_file":
            value = argument.partition("=")[2] or "".join(arguments[position + 1 : position + 2])
            return Path(value)
    return None


def option_name(argument: str) -> str:
    """`section.key` of an argument `--section.key` or `--section.key=value`."""
    return argument.partition("=")[0].replace("-", "_").lstrip("_")


def read_tables(path: Path | None) -> dict[str, Any]:
    """The tables of a recipe file; none for a model that has no recipe.

    Raises:
        UserError: the file cannot be read or is not TOML.
    """
    if path is None:
        return {}
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read recipe {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path} is not TOML: {first_line(error)}") from error


def data_config(tables: dict[str, Any]) -> DataConfig:
    """The `[data]` section of a recipe's tables.

    Raises:
        UserError: it is no table, or has a key that there is not.
    """
    table = tables.get("data", {})
    if not isinstance(table, dict):
        raise UserError("recipe key data is not a section: write [data]")
    unknown = sorted(set(table) - {field.name for field in dataclasses.fields(DataConfig)})
    if unknown:
        raise UserError(f"recipe key data.{unknown[0]} is unknown")
    return DataConfig(**table)


def sequence_length(tables: dict[str, Any]) -> int | None:
    """`training.seq_len` of a recipe's tables, if it is there."""
    length = tables.get("training", {}).get("seq_len")
    return length if isinstance(length, int) and length > 0 else None
