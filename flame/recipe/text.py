"""Writing a recipe as TOML."""

import dataclasses
import json
from typing import Any

ALWAYS_WRITTEN = ("data.", "training.seq_len", "training.steps", "training.local_batch_size")
"""Beginnings of the keys that a written recipe names even if they have their default."""


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
