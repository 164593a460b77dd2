"""What a sweep of several models leaves to read: JSON, tables in every format, one HTML page."""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from launch.drawing.sweep_chart import sweep_chart
from launch.drawing.table import Column, Table
from launch.reporting.render import Panel, render
from launch.sweeping.comparison.tables import NOTE, VERDICTS, Row, every_row, grids
from launch.sweeping.folder import PAGE_FILE
from launch.sweeping.page import CONTROL, RESULTS, channels, distance_from_half, write_whole
from launch.sweeping.tables import percent

KL_AXIS = "KL, nats a token"
MOST_LINES = 7
"""Methods that a chart shows."""


def write_comparison(folder: Path, results: Mapping[str, Any], copy: Path | None = None) -> None:
    """Write results.json, .csv, .md and .tex and the page; each is whole or not there.

    Args:
        copy: another place for the JSON.
    """
    rows = results["comparison"]
    found = list(grids(rows))
    text = json.dumps(results, indent=1, ensure_ascii=False) + "\n"
    marked = "\n\n".join(f"**{grid.heading}**\n\n{grid.table.markdown()}" for grid in found)
    latex = "\n\n".join(f"% {grid.heading}\n{grid.table.latex()}" for grid in found)
    write_whole(
        {
            folder / f"{RESULTS}.json": text,
            folder / f"{RESULTS}.csv": every_row(rows).csv(),
            folder / f"{RESULTS}.md": f"{marked}\n",
            folder / f"{RESULTS}.tex": f"{latex}\n",
            folder / PAGE_FILE: page(results),
            **({copy: text} if copy is not None else {}),
        }
    )


def page(results: Mapping[str, Any]) -> str:
    """The HTML: a sentence, the charts, the tables, and how it was made; no script, no link."""
    rows = results["comparison"]
    return render(
        "comparison.html",
        title=results["title"],
        verdict=verdict(rows),
        charts=list(charts(rows, results["reference"])),
        models=models_table(results),
        groups={name: list(own) for name, own in groupby(grids(rows), lambda grid: grid.group)},
        note=NOTE,
        every_row=every_row(rows),
        commands=[results["command"]],
        facts={**results["facts"], **results["versions"]},
    )


def verdict(rows: Sequence[Row]) -> str:
    """One sentence: the method of the least divergence at the ratio nearest a half."""
    rows = [row for row in rows if row["stage"] == "before" and row["method"] != CONTROL]
    if not rows:
        return "No point was measured of all models."
    first = [row for row in rows if row["group"] == rows[0]["group"]]
    middle = min(first, key=distance_from_half)
    same = [r for r in first if (r["space"], r["ratio"]) == (middle["space"], middle["ratio"])]
    best = min(same, key=lambda row: row["kl"])
    what = f"With {percent(best['ratio'])} of the {channels(best['space'])} removed"
    found = f"{what}, {best['method']} is nearest to the dense model: KL {best['kl']:.4f} nats"
    if best.get("kl_ratio") is None:
        return f"{found} a token."
    kl = f"{found} a token, {best['kl_ratio']:.2f} of {best['reference']}'s"
    rise = f"its loss rises by {best['rise']:.4f}"
    if best["rise_ratio"] is not None:
        rise += f", {best['rise_ratio']:.2f} of {best['reference']}'s"
    count = f" in {best['rise_ahead']} of {best['models']} models"
    level = VERDICTS[best["rise_sign"]]
    return f"{kl}; {rise} ({level}{count if level == 'ahead' else ''})."


def models_table(results: Mapping[str, Any]) -> Table:
    """A row for each model, with its perplexity."""
    columns = [
        Column("group", "kind", align="left"),
        Column("name", "model", align="left"),
        Column("before", "perplexity", ",.3f"),
        Column("recovered", "trained on as long as recovery", ",.3f"),
    ]
    found = [{**model, **results["perplexity"][model["name"]]} for model in results["models"]]
    used = [c for c in columns if any(row.get(c.key) is not None for row in found)]
    return Table(used, found)


def charts(rows: Sequence[Row], reference: Sequence[str] = ()) -> Iterator[Panel]:
    """KL against the state removed, before recovery, for each group and kind of space."""
    rows = [row for row in rows if row["stage"] == "before" and row["removed"] is not None]
    for space in dict.fromkeys(row["space"] for row in rows):
        of_space = [row for row in rows if row["space"] == space]
        names = _shown(of_space, (*reference, CONTROL))
        colours = {name: number for number, name in enumerate(n for n in names if n != CONTROL)}
        for group in dict.fromkeys(row["group"] for row in of_space):
            drawn = [
                {"method": r["method"], "removed": r["removed"], "before": r["kl"]}
                for r in of_space
                if r["group"] == group and r["method"] in names
            ]
            if len({row["removed"] for row in drawn}) > 1:
                title = f"{channels(space)}, {group}"
                title = title[0].upper() + title[1:]
                picture = sweep_chart(drawn, "before", None, colours, title, KL_AXIS)
                yield Panel(title, picture)


def _shown(rows: Sequence[Row], always: Sequence[str]) -> list[str]:
    """Methods to draw: `always`, and those nearest to the dense model at the ratio about a half."""
    middle = min(rows, key=distance_from_half)
    first = [r for r in rows if (r["group"], r["ratio"]) == (middle["group"], middle["ratio"])]
    order = [row["method"] for row in sorted(first, key=lambda row: row["kl"])]
    kept = [name for name in order if name in always]
    others = [name for name in order if name not in always]
    return kept + others[: max(MOST_LINES - len(kept), 0)]
