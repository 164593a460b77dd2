"""The tables of `slimstate capacity` and `serve-check`, in a terminal and in a report."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from launch.drawing.table import Column, Table
from launch.reporting.sentences import bytes_text

KERNEL_COLUMNS = (
    Column("engine", "engine", align="left"),
    Column("class", "loads as", align="left"),
    Column("kernel", "kernel", align="left"),
    Column("for", "for", align="left"),
    Column("where", "on", align="left"),
    Column("flag", "asked for by", align="left"),
    Column("evidence", "known by", align="left"),
)
"""The columns of a table of kernels; a row is a kernel of an engine that takes the model."""


def capacity_table(measures: Iterable[Mapping[str, Any]], models: Sequence[str]) -> Table:
    """Return a row for each figure, a column for each model, and the first over the second.

    Args:
        measures: `label`, `unit` and `values` by model, as the JSON of `slimstate capacity` has.
        models: one model or two.
    """
    columns = [Column("label", "measure", align="left"), *map(Column, models)]
    if len(models) == 2:
        columns.append(Column("ratio", "ratio", ".3f"))
    return Table(columns, [_cells(measure, models) for measure in measures])


def _cells(measure: Mapping[str, Any], models: Sequence[str]) -> dict[str, Any]:
    values = measure["values"]
    written = {
        name: bytes_text(values[name]) if measure["unit"] == "bytes" else f"{values[name]:,}"
        for name in models
    }
    ratio = values[models[0]] / values[models[-1]] if values[models[-1]] else None
    return {"label": measure["label"], **written, "ratio": ratio}


def kernels_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return a row for each kernel that takes a model, with its engine and how it is known."""
    return Table(KERNEL_COLUMNS, rows)
