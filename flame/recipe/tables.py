"""Reading recipes as TOML tables, and what stages that do not train need of them."""

from pathlib import Path
from typing import Any

from flame.data.config import DataConfig
from flame.errors import UserError
from flame.recipe.keys import fill_section, unknown_key
from flame.recipe.paths import beside
from flame.storage.toml_file import read_toml


def read_tables(path: Path | None) -> dict[str, Any]:
    """Return the tables of a recipe file; none if `path` is None, for a model without a recipe.

    Inputs that lie beside the recipe are named by their full paths (`flame.recipe.paths`).

    Raises:
        UserError: the file cannot be read, is not TOML, or holds a key outside any section.
    """
    tables = {} if path is None else read_toml(path, "recipe")
    for name, value in tables.items():
        if not isinstance(value, dict):
            raise UserError(f"recipe key {name} is not a section: write [{name}]")
    return tables if path is None else beside(tables, path.parent)


def data_config(tables: dict[str, Any]) -> DataConfig:
    """Return the `[data]` section of a recipe's tables; raise `UserError` if it is wrong."""
    config = DataConfig()
    for name in fill_section(config, "data", tables.get("data", {})):
        raise unknown_key(name)
    return config


def sequence_length(tables: dict[str, Any]) -> int | None:
    """Return `training.seq_len` of a recipe's tables, None if it is not there."""
    length = tables.get("training", {}).get("seq_len")
    return length if type(length) is int and length > 0 else None
