"""Accuracies of recall as tables, in percent: a row for each model."""

from collections.abc import Callable
from typing import Any

from launch.drawing.table import Column, Table


def mqar_table(records: list[dict[str, Any]]) -> Table:
    """Return accuracies in percent: a row for each model, a column for each number of pairs."""
    columns = [Column("model", align="left"), Column("state_bytes", "state bytes", ",d")]
    return _percentages(columns, records, "mqar", lambda cell: f"{cell['pairs']} pairs")


def needle_table(records: list[dict[str, Any]]) -> Table:
    """Return accuracies in percent: a row for each model, a column for each length and depth."""
    columns = [Column("model", align="left")]
    return _percentages(
        columns, records, "needle", lambda cell: f"{cell['length']} words, at {cell['depth']} %"
    )


def _percentages(
    columns: list[Column],
    records: list[dict[str, Any]],
    task: str,
    heading: Callable[[dict[str, Any]], str],
) -> Table:
    rows = [
        {**record, **{heading(cell): 100 * cell["accuracy"] for cell in record[task]}}
        for record in records
    ]
    cells = [Column(heading(cell), number=".1f") for cell in records[0][task]]
    return Table([*columns, *cells], rows)
