"""Paths in recipes: where relative ones lead, and how a run folder's own recipe writes them.

Inputs are looked for beside the recipe, then in the working directory; what lies in neither is a
hub name, or missing. Outputs (`job.dump_folder`) lie in the working directory. A run folder's
recipe names its own config and tokenizer relative to itself and the rest absolutely, so that the
folder works from every directory and after it was moved.
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

INPUTS = (
    ("model", "config"),
    ("model", "init"),
    ("data", "dataset"),
    ("data", "heldout"),
    ("data", "sources"),
    ("data", "tokenizer"),
    ("lora", "init"),
    ("distill", "teacher"),
)
"""Section and key of what a recipe reads."""

OPTIONS = "?"
"""What stands between the name of a source and its options."""


def beside(tables: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return a recipe's tables, with full paths of the inputs that lie in its `folder`."""
    found = dict(tables)
    for section, key in INPUTS:
        if isinstance(value := tables.get(section, {}).get(key), str | list):
            found[section] = {**found[section], key: _each(value, folder)}
    return found


def in_run_folder(job: Any, folder: Path, own_tokenizer: bool = True) -> Any:
    """Return `job` as the recipe of a run in `folder` names its paths.

    Args:
        job: a `flame.config.JobConfig`.
        folder: the run folder, which has the model's `config.json`.
        own_tokenizer: the folder has the tokenizer, too.
    """
    here = Path.cwd()
    sections = {
        name: dataclasses.replace(getattr(job, name)) for name in ("job", "model", "data", "lora")
    }
    job = dataclasses.replace(job, **sections, distill=dataclasses.replace(job.distill))
    for section, key in INPUTS:
        place = getattr(job, section)
        setattr(place, key, _each(getattr(place, key), here))
    job.job.dump_folder = os.path.abspath(folder)
    job.model.config = "config.json"
    job.data.tokenizer = "." if own_tokenizer else job.data.tokenizer
    return job


def _each(value: Any, folder: Path) -> Any:
    if isinstance(value, list):
        return [_full(item, folder) if isinstance(item, str) else item for item in value]
    return _full(value, folder)


def _full(name: str, folder: Path) -> str:
    """Return `name`, a path relative to `folder`, in full; or as it is, if nothing is there."""
    path, mark, options = name.partition(OPTIONS)
    try:
        if path and not os.path.isabs(path) and (folder / path).exists():
            return os.path.normpath((folder / path).absolute()) + mark + options
    except (OSError, ValueError):
        # No file can have such a name.
        pass
    return name
