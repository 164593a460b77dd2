"""One self-contained HTML page about a run: what pruning saved, what it cost, how it was measured.

The page's sentences are computed from the numbers (`launch.reporting.sentences`).
"""

from collections.abc import Mapping
from pathlib import Path

from flame.process.atomic_output import replacing_file
from launch.reporting import sections
from launch.reporting.blocks import Tile, render
from launch.reporting.data import ReportData
from launch.reporting.sentences import (
    Row,
    bytes_text,
    change_text,
    control_of,
    described,
    number,
    short,
    verdict,
)
from launch.sweeping.page import sweep_sections
from launch.sweeping.tables import sweep_of

CHANGES = (
    ("Recurrent state a sequence", "state_bytes", bytes_text),
    ("Held-out perplexity", "perplexity", short),
    ("Decoded tokens a second", "decode_tokens_per_second", lambda value: f"{value:,.0f}"),
    ("Parameters", "parameters", lambda value: f"{value:,.0f}"),
)
"""What stands at the head of the page: label, key of a row, and how a value is written."""


def write_report(path: Path, data: ReportData, overwrite: bool = False) -> Path:
    """Write the page of `data` to `path`, whole or not at all; return `path`."""
    text = page(data)
    with replacing_file(Path(path), overwrite) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


def page(data: ReportData) -> str:
    """The HTML of a report: one file with its style and pictures, without a script or a link."""
    found = [
        *sections.models(data),
        *sections.scores(data),
        *sections.speed(data),
        *(section for results in data.sweeps for section in sweep_sections(sweep_of(results))),
        *sections.pruned(data),
        *sections.ranks(data),
        *sections.training(data),
        *sections.made(data),
    ]
    control = control_of(data.rows)
    note = f"From {described(control)} to the recovered one."
    return render(data.title, verdict(data.rows), found, _tiles(data.rows), note)


def _tiles(rows: Mapping[str, Row]) -> list[Tile]:
    """The changes that matter, from the dense model to the recovered one."""
    control = control_of(rows)
    if control is None or "recovered" not in rows:
        return []
    tiles = []
    for label, key, write in CHANGES:
        before, after = number(rows, control, key), number(rows, "recovered", key)
        if before and after is not None:
            values = f"{write(before)} → {write(after)}"
            tiles.append(Tile(label, change_text(before, after), values))
    return tiles
