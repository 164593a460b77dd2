"""What a sweep leaves to read: its results as JSON, tables in every format, and one HTML page."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flame.process.atomic_output import replacing_file
from launch.drawing.sweep_chart import sweep_chart
from launch.reporting.blocks import (
    Block,
    Folded,
    Panel,
    Panels,
    Record,
    Section,
    TableBlock,
    bars,
    render,
)
from launch.reporting.sentences import short
from launch.sweeping.tables import (
    HEADING,
    NOTE,
    Row,
    Sweep,
    percent,
    rows_table,
    sweep_of,
    with_spread,
)

PAGE_FILE = "sweep.html"
RESULTS = "results"
OWN_HEADING = "Points with a ratio of their own"
CONTROL = "random"
"""The method that the others are compared with."""


def write_files(folder: Path, results: Mapping[str, Any], copy: Path | None = None) -> None:
    """Write results.json, .csv, .md and .tex and the page; each is whole or not there.

    Args:
        copy: another place for the JSON.
    """
    sweep = sweep_of(results)
    text = json.dumps(results, indent=1, ensure_ascii=False) + "\n"
    tables = sweep.tables()
    files = {
        folder / f"{RESULTS}.json": text,
        folder / f"{RESULTS}.csv": rows_table(sweep.rows).csv(),
        folder / f"{RESULTS}.md": "\n\n".join(table.markdown() for table in tables) + "\n",
        folder / f"{RESULTS}.tex": "\n\n".join(table.latex() for table in tables) + "\n",
        folder / PAGE_FILE: page(sweep, results),
        **({copy: text} if copy is not None else {}),
    }
    for path, content in files.items():
        with replacing_file(path, overwrite=True) as temporary:
            temporary.write_text(content, encoding="utf-8")


def page(sweep: Sweep, results: Mapping[str, Any]) -> str:
    """The HTML: a sentence, the charts, the tables, and how it was made; no script, no link."""
    said = dict.fromkeys(note for row in sweep.rows for note in row.get("notes") or [])
    notes = [Section("What the methods say", " ".join(said), [])] if said else []
    facts = {**results.get("facts", {}), **results.get("versions", {})}
    made = Section("How it was made", "", [Record(results.get("commands", ()), facts)])
    return render(sweep.title, verdict(sweep), [*sweep_sections(sweep), *notes, made])


def sweep_sections(sweep: Sweep) -> list[Section]:
    """The charts and the tables of a sweep, for its own page and a report's."""
    grid, own = sweep.grid_table(), sweep.own_table()
    tables: list[Block] = [TableBlock(grid, "wide")] if grid else []
    tables += [TableBlock(own, "wide", OWN_HEADING)] if own else []
    rows = TableBlock(rows_table(sweep.rows), "wide")
    folded = Folded("Every point in numbers", [rows])
    return [_charts(sweep), Section(HEADING, NOTE, [*tables, folded])]


def verdict(sweep: Sweep) -> str:
    """One sentence: where the methods end at the ratio nearest a half, beside the control."""
    stage = sweep.stages[-1] if sweep.stages else ""
    rows = [row for row in sweep.rows if row.get(stage) is not None]
    if not rows:
        return "No point was measured."
    middle = min(rows, key=_distance_from_half)
    group = [r for r in rows if (r["space"], r["ratio"]) == (middle["space"], middle["ratio"])]
    named = sorted((r for r in group if r["method"] != CONTROL), key=lambda row: row[stage])
    best, *_, worst = [*(named or group), (named or group)[-1]]
    what = f"With {percent(best['ratio'])} of the {_channels(best['space'])} removed"
    ends = f"{best['method']} has perplexity {short(best[stage])}"
    if len(named) > 1:
        ends = f"{len(named)} methods have perplexity {short(best[stage])} ({best['method']})"
        ends += f" to {short(worst[stage])} ({worst['method']})"
    after = " after recovery" if stage == "recovered" else ""
    beside = [f"{short(v)} of the dense model" for v in [sweep.controls.get(stage)] if v]
    drawn = next((row for row in group if row["method"] == CONTROL and row is not best), None)
    beside += [f"{short(drawn[stage])} at random"] if drawn else []
    against = f", against {' and '.join(beside)}" if beside else ""
    return f"{what}, {ends}{after}{against}."


def _channels(space: str) -> str:
    """`key+head` as `key channels and heads`."""
    kinds = ("heads" if kind == "head" else f"{kind} channels" for kind in space.split("+"))
    return " and ".join(kinds)


def _distance_from_half(row: Row) -> float:
    try:
        return abs(float(row["ratio"]) - 0.5)
    except ValueError:
        return 1.0


def _charts(sweep: Sweep) -> Section:
    """A row of charts for each kind of space, a chart for each stage."""
    names = dict.fromkeys(row["method"] for row in sweep.rows if row["method"] != CONTROL)
    colours = {name: number for number, name in enumerate(names)}
    blocks = []
    for space in dict.fromkeys(row["space"] for row in sweep.rows):
        rows = [row for row in sweep.rows if row["space"] == space]
        drawn = []
        for stage in sweep.stages:
            when = "before recovery" if stage == "before" else "after recovery"
            title = f"{_channels(space)}, {when}".capitalize()
            drawn += _panel(rows, stage, sweep.controls.get(stage), colours, title)
        blocks += [Panels(drawn)] if drawn else []
    note = (
        "Held-out perplexity; lower is better. Axes are logarithmic, bars start at 0. The grey "
        "band is one standard deviation of random channels, the dashed line the model before "
        "pruning; after recovery, that model trained on for as long, where it was."
    )
    return Section("Perplexity against the state removed", note, blocks)


def _panel(
    rows: Sequence[Row], stage: str, dense: float | None, colours: Mapping[str, int], title: str
) -> list[Panel]:
    """Lines over the state removed, or bars where all rows are without the same part of it."""
    if len({row.get("removed") for row in rows}) > 1:
        chart = sweep_chart(rows, stage, dense, colours, title)
        return [Panel(title, chart)] if chart else []
    values = {row["method"]: row[stage] for row in rows if row.get(stage) is not None}
    texts = {row["method"]: with_spread(row, stage) or "" for row in rows}
    drawn = bars(values, {}, texts, mark=dense, role="soft", thin=True)
    return [Panel(title, blocks=[drawn])] if values else []
