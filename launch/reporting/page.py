"""One self-contained HTML page about a run: what pruning saved, what it cost, how it was measured.

`templates/report.html` has its sections; its sentences are computed from the numbers
(`launch.reporting.claims`).
"""

from pathlib import Path

from flame.process.atomic_output import replacing_file
from launch.reporting import claims, pictures, tables
from launch.reporting.data import ReportData
from launch.reporting.render import render
from launch.speed import bench_table
from launch.sweeping import tables as sweep_tables
from launch.sweeping.page import charts


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
    leading = claims.leading(data)
    return render(
        "report.html",
        title=data.title,
        verdict=claims.verdict(data),
        changes=list(claims.changes(data)),
        data=data,
        leading=leading,
        details=claims.details(data),
        colour=data.colour,
        sweeps=[(sweep, charts(sweep)) for sweep in map(sweep_tables.sweep_of, data.sweeps)],
        commands=data.commands,
        facts={**known, **data.facts, **data.versions},
        bench_table=bench_table,
        pictures=pictures,
        tables=tables,
        words=sweep_tables,
    )
