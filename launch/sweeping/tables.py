"""The tables of a sweep: methods against ratios, and every row with all that was measured."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from launch.drawing.table import Column, Table
from launch.evaluation.intervals import DocumentLosses, difference, read_losses
from launch.sweeping.points import Point

STAGES = {"before": "pruned", "recovered": "recovered"}
"""When perplexity is measured, and how a reader calls it."""

ROW_COLUMNS = (
    Column("method", "method", align="left"),
    Column("space", "space", align="left"),
    Column("ratio", "ratio", align="left"),
    Column("width", "kept"),
    Column("removed", "state removed", ".1%"),
    Column("state_bytes", "state bytes", ",.0f"),
    Column("before", "pruned", ",.2f"),
    Column("before_spread", "±", ",.2f"),
    Column("before_rise", "nats above dense [95 %]"),
    Column("recovered", "recovered", ",.2f"),
    Column("recovered_spread", "±", ",.2f"),
    Column("recovered_rise", "nats above dense trained on [95 %]"),
    Column("seeds", "seeds", "d"),
)

HEADING = "Perplexity by method and ratio"
NOTE = (
    "Held-out perplexity; the ratio is the part of the channels that was removed. Random channels "
    "are the control: mean ± standard deviation over seeds. Rises of the loss over that of the "
    "dense model have intervals by a bootstrap over the same documents, seeds averaged."
)

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Sweep:
    """What a sweep found."""

    title: str
    rows: Sequence[Row]
    """The keys of ROW_COLUMNS, and `removed`, the part of the state; a row for each point."""

    grid: Sequence[str]
    """The ratios of columns: those of `--ratios`."""

    controls: Mapping[str, float | None]
    """Perplexity of the model itself by the keys of STAGES; `recovered` is trained on."""

    @property
    def stages(self) -> list[str]:
        """The stages that anything was measured in."""
        return [stage for stage in STAGES if any(row.get(stage) is not None for row in self.rows)]

    def tables(self) -> list[Table]:
        """Methods against ratios, then points with ratios of their own; those that there are."""
        return [table for table in (self.grid_table(), self.own_table()) if table is not None]

    def grid_table(self) -> Table | None:
        """A row a method and kind of space; for each ratio a column a stage."""
        rows = [row for row in self.rows if not row["own_ratio"]]
        if not rows:
            return None
        columns = [Column("method", "method", align="left")]
        several = len({row["space"] for row in rows}) > 1
        columns += [Column("space", "space", align="left")] if several else []
        columns += [
            Column(f"{ratio} {stage}", f"{percent(ratio)} {STAGES[stage]}")
            for ratio in self.grid
            for stage in self.stages
            if any(row["ratio"] == ratio and row.get(stage) is not None for row in rows)
        ]
        lines: dict[tuple[str, str], dict[str, Any]] = {}
        for row in rows:
            line = lines.setdefault((row["space"], row["method"]), {})
            line |= {"method": row["method"], "space": row["space"]}
            for stage in self.stages:
                line[f"{row['ratio']} {stage}"] = with_spread(row, stage)
        return Table(columns, [*self._control_line(), *lines.values()])

    def own_table(self) -> Table | None:
        """A row for each point with a ratio of its own."""
        rows = [row for row in self.rows if row["own_ratio"]]
        if not rows:
            return None
        # Where there is no other table, the control stands in this one.
        control = {"method": "dense", **self.controls} if len(rows) == len(self.rows) else None
        return rows_table([control, *rows] if control else rows)

    def _control_line(self) -> list[dict[str, Any]]:
        known = {s: f"{v:,.2f}" for s, v in self.controls.items() if v is not None}
        cells = {f"{ratio} {stage}": known.get(stage) for ratio in self.grid for stage in STAGES}
        return [{"method": "dense", "space": "", **cells}] if known else []


def sweep_of(results: Mapping[str, Any]) -> Sweep:
    """The sweep that results.json describes."""
    controls = {stage: results["controls"].get(stage) for stage in STAGES}
    return Sweep(results["title"], results["rows"], results["ratios"], controls)


def rows_table(rows: Sequence[Row]) -> Table:
    """A row a point; columns of which no row has a value are left out."""
    used = [c for c in ROW_COLUMNS if any(row.get(c.key) is not None for row in rows)]
    return Table(used, rows)


def collect_rows(
    points: Iterable[Point],
    records: Mapping[str, Mapping[str, Any]],
    controls: Mapping[str, Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """A row for each point that was measured; points that differ in their seed alone are one.

    Args:
        points: of the sweep, in order.
        records: by the points' `file_name`.
        controls: measures of the model itself by stage; empty where it was not measured.
    """
    groups: dict[tuple[str, str, str, bool], list[Mapping[str, Any]]] = {}
    for point in points:
        if point.file_name in records:
            key = (point.method, point.space, point.ratio, point.own_ratio)
            groups.setdefault(key, []).append(records[point.file_name])
    return [_row(key, found, controls) for key, found in groups.items()]


def _row(
    key: tuple[str, str, str, bool],
    found: Sequence[Mapping[str, Any]],
    controls: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    (method, space, ratio, own_ratio), dense = key, controls["before"]
    state = found[0]["before"]["state_bytes"]
    row: dict[str, Any] = {
        "method": method,
        "space": space,
        "ratio": ratio,
        "own_ratio": own_ratio,
        "width": _width(found[0]["widths"]),
        "state_bytes": state,
        "removed": None if not state or not dense.get("state_bytes") else _removed(state, dense),
        "parameters": found[0]["before"]["parameters"],
        "seeds": len(found) if len(found) > 1 else None,
        "notes": list(dict.fromkeys(note for record in found for note in record["notes"])),
    }
    for stage in STAGES:
        values = [record[stage]["perplexity"] for record in found if stage in record]
        row |= {stage: fmean(values), f"{stage}_all": values} if values else {}
        row |= {f"{stage}_spread": stdev(values)} if len(values) > 1 else {}
        measured = [record[stage] for record in found if stage in record]
        rise = difference(_mean_losses(measured), read_losses(controls[stage]))
        row |= {f"{stage}_rise": rise.text(), f"{stage}_difference": rise.record()} if rise else {}
    return row


def _mean_losses(measured: Sequence[Mapping[str, Any]]) -> DocumentLosses | None:
    """The losses by document, averaged over models; None if they are not known or not alike."""
    found = [losses for record in measured if (losses := read_losses(record)) is not None]
    if not found or len(found) < len(measured) or any(f.tokens != found[0].tokens for f in found):
        return None
    means = [fmean(losses) for losses in zip(*(f.losses for f in found), strict=True)]
    return DocumentLosses(means, found[0].tokens)


def without_documents(record: Mapping[str, Any]) -> dict[str, Any]:
    """A point's record without its losses and divergences by document, which are long."""
    long = ("documents", "divergences")
    return {
        key: {k: v for k, v in value.items() if k not in long} if key in STAGES else value
        for key, value in record.items()
    }


def _width(widths: Mapping[str, Sequence[int]]) -> str:
    """`16`, `8–24` where heads differ, and `24 key, 3 head` of several kinds."""
    texts = {
        kind: f"{low}" if low == high else f"{low}–{high}" for kind, (low, high) in widths.items()
    }
    if len(texts) == 1:
        return next(iter(texts.values()))
    return ", ".join(f"{text} {kind}" for kind, text in texts.items())


def _removed(state: float, dense: Mapping[str, Any]) -> float:
    return 1 - state / dense["state_bytes"]


def with_spread(row: Row, stage: str) -> str | None:
    """A perplexity with its standard deviation, where it has one."""
    value, spread = row.get(stage), row.get(f"{stage}_spread")
    if value is None:
        return None
    return f"{value:,.2f}" if spread is None else f"{value:,.2f} ± {spread:,.2f}"


def percent(ratio: str) -> str:
    """A ratio as a reader sees it; several ratios as they are."""
    try:
        value = 100 * float(ratio)
    except ValueError:
        return ratio
    return f"{value:.3g} %" if math.isfinite(value) else ratio
