"""What a sweep leaves to read: its results as JSON, tables in every format, and one HTML page."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flame.process.atomic_output import replacing_file
from launch.drawing.sweep_chart import sweep_chart
from launch.reporting.render import Bars, Panel, render
from launch.reporting.sentences import short
from launch.sweeping import tables
from launch.sweeping.comparison.tables import NOTE, grids
from launch.sweeping.folder import PAGE_FILE
from launch.sweeping.tables import Row, Sweep, percent, rows_table, sweep_of, with_spread

RESULTS = "results"
CONTROL = "random"
"""The method that the others are compared with."""


def write_files(folder: Path, results: Mapping[str, Any], copy: Path | None = None) -> None:
    """Write results.json, .csv, .md and .tex and the page; each is whole or not there.

    Args:
        copy: another place for the JSON.
    """
    sweep = sweep_of(results)
    found = list(grids(results.get("comparison", ())))
    marked = [table.markdown() for table in sweep.tables()]
    marked += [f"**{grid.heading}**\n\n{grid.table.markdown()}" for grid in found]
    latex = [table.latex() for table in sweep.tables()]
    latex += [f"% {grid.heading}\n{grid.table.latex()}" for grid in found]
    text = json.dumps(results, indent=1, ensure_ascii=False) + "\n"
    files = {
        folder / f"{RESULTS}.json": text,
        folder / f"{RESULTS}.csv": rows_table(sweep.rows).csv(),
        folder / f"{RESULTS}.md": "\n\n".join(marked) + "\n",
        folder / f"{RESULTS}.tex": "\n\n".join(latex) + "\n",
        folder / PAGE_FILE: page(sweep, results),
        **({copy: text} if copy is not None else {}),
    }
    write_whole(files)


def write_whole(files: Mapping[Path, str]) -> None:
    """Write text files, each whole or not at all, over older ones."""
    for path, content in files.items():
        with replacing_file(path, overwrite=True) as temporary:
            temporary.write_text(content, encoding="utf-8")


def page(sweep: Sweep, results: Mapping[str, Any]) -> str:
    """The HTML: a sentence, the charts, the tables, and how it was made; no script, no link."""
    return render(
        "sweep.html",
        title=sweep.title,
        verdict=verdict(sweep),
        sweep=sweep,
        charts=charts(sweep),
        words=tables,
        grids=list(grids(results.get("comparison", ()))),
        grids_note=NOTE,
        notes=list(dict.fromkeys(n for row in sweep.rows for n in row.get("notes") or [])),
        commands=[results["command"]],
        facts={**results.get("facts", {}), **results["versions"]},
    )


def verdict(sweep: Sweep) -> str:
    """One sentence: where the methods end at the ratio nearest a half, beside the control."""
    stage = sweep.stages[-1] if sweep.stages else ""
    rows = [row for row in sweep.rows if row.get(stage) is not None]
    if not rows:
        return "No point was measured."
    middle = min(rows, key=distance_from_half)
    group = [r for r in rows if (r["space"], r["ratio"]) == (middle["space"], middle["ratio"])]
    named = sorted((r for r in group if r["method"] != CONTROL), key=lambda row: row[stage])
    best, *_, worst = [*(named or group), (named or group)[-1]]
    what = f"With {percent(best['ratio'])} of the {channels(best['space'])} removed"
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


def channels(space: str) -> str:
    """Return `key+head` as `key channels and heads`."""
    # Here, since it needs torch, which reading a page does not.
    from pruning.spaces import KINDS, NOUNS

    return " and ".join(NOUNS[kind] for kind in KINDS if kind in space.split("+"))


def distance_from_half(row: Row) -> float:
    try:
        return abs(float(row["ratio"]) - 0.5)
    except ValueError:
        return 1.0


def charts(sweep: Sweep) -> list[list[Panel]]:
    """A row of panels for each kind of space, a panel for each stage."""
    names = dict.fromkeys(row["method"] for row in sweep.rows if row["method"] != CONTROL)
    colours = {name: number for number, name in enumerate(names)}
    found = []
    for space in dict.fromkeys(row["space"] for row in sweep.rows):
        panels = []
        for stage in sweep.stages:
            rows = [row for row in sweep.rows if row["space"] == space and row.get(stage)]
            when = "before recovery" if stage == "before" else "after recovery"
            title = f"{channels(space)}, {when}".capitalize()
            panel = _panel(rows, stage, sweep.controls.get(stage), colours, title)
            panels += [panel] if panel.picture or panel.bars else []
        found += [panels] if panels else []
    return found


def _panel(
    rows: Sequence[Row], stage: str, dense: float | None, colours: Mapping[str, int], title: str
) -> Panel:
    """Lines over the state removed, or bars where all rows are without the same part of it."""
    if len({row.get("removed") for row in rows}) > 1:
        return Panel(title, sweep_chart(rows, stage, dense, colours, title))
    values = {row["method"]: row[stage] for row in rows}
    texts = {row["method"]: with_spread(row, stage) or "" for row in rows}
    return Panel(title, bars=[Bars(values, texts, "soft", mark=dense)] if values else [])
