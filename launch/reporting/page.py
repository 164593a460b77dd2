"""One self-contained HTML page about a run: what pruning saved, what it cost, how it was measured.

`templates/report.html` has its sections; its sentences are computed from the numbers
(`launch.reporting.sentences`).
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

from flame.process.atomic_output import replacing_file
from launch.reporting import pictures, sentences, tables
from launch.reporting.data import ReportData
from launch.reporting.render import render
from launch.reporting.sentences import Row, bytes_text, short
from launch.speed import bench_table
from launch.sweeping import tables as sweep_tables
from launch.sweeping.page import charts

CHANGES = (
    ("Recurrent state a sequence", "state_bytes", bytes_text),
    ("Held-out perplexity", "perplexity", short),
    ("Decoded tokens a second", "decode_tokens_per_second", lambda value: f"{value:,.0f}"),
    ("Parameters", "parameters", lambda value: f"{value:,.0f}"),
)
"""Changes at the head of the page: label, key of a row, and how a value is written."""


def write_report(path: Path, data: ReportData, overwrite: bool = False) -> Path:
    """Write the page, whole or not at all; return `path`. Without `overwrite` it must be new."""
    text = page(data)
    with replacing_file(Path(path), overwrite) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


def page(data: ReportData) -> str:
    """Return the HTML of a report."""
    run = {"seed": data.seed, "processes": data.world_size}
    known = {name: value for name, value in run.items() if value is not None}
    return render(
        "report.html",
        title=data.title,
        verdict=sentences.verdict(data.rows),
        changes=list(_changes(data.rows)),
        data=data,
        control=sentences.described(sentences.control_of(data.rows)),
        sweeps=[(sweep, charts(sweep)) for sweep in map(sweep_tables.sweep_of, data.sweeps)],
        commands=data.commands,
        facts={**known, **data.facts, **data.versions},
        bench_table=bench_table,
        pictures=pictures,
        sentences=sentences,
        tables=tables,
        words=sweep_tables,
    )


def _changes(rows: Mapping[str, Row]) -> Iterator[tuple[str, str, str]]:
    """Yield label, change and values of `CHANGES`, from the dense control to `recovered`."""
    control = sentences.control_of(rows)
    for label, key, write in CHANGES if control and "recovered" in rows else ():
        before = sentences.number(rows, str(control), key)
        after = sentences.number(rows, "recovered", key)
        if before and after is not None:
            change = sentences.change_text(before, after)
            yield label, change, f"{write(before)} → {write(after)}"
