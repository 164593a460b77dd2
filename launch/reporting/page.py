"""One self-contained HTML page about a run: what pruning saved, what it cost, how it was measured.

`write_report` needs nothing but a `ReportData`; it imports neither torch nor a plotting library.
The page's sentences are computed from the numbers (`launch.reporting.sentences`).
"""

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template

from flame.errors import UserError
from flame.process.atomic_output import replacing_file
from launch.drawing.bars import bars
from launch.drawing.charts import Line, line_chart
from launch.ranks.spectra import Spectrum
from launch.reporting.data import KeptChannels, ReportData
from launch.reporting.kept import kept_section
from launch.reporting.page_parts import panels, section
from launch.reporting.sections import (
    bench_section,
    fidelity_section,
    noise_section,
    plans_section,
    ranks_section,
    recall_section,
    scrolled,
    tasks_section,
)
from launch.reporting.sentences import (
    LABELS,
    Row,
    bytes_text,
    change_text,
    comparison,
    control_of,
    described,
    number,
    perplexity,
    short,
    verdict,
)
from launch.reporting.tables import COLUMNS, models_note, summary_table
from launch.sweeping.page import sweep_sections
from launch.sweeping.tables import sweep_of

__all__ = ["COLUMNS", "KeptChannels", "ReportData", "page", "summary_table", "write_report"]

LOG_SCALE_FROM = 6.0
"""Ratio of the largest perplexity to the smallest above which bars are logarithmic."""

LOSS_TAG = "loss_metrics/global_avg_loss"
"""torchtitan's TensorBoard tag of the mean loss over all ranks, in nats per token."""

SMALLEST_DRAWN = 1e-8
"""Singular values, over the largest, below this are fp32 noise and drawn at it."""


def write_report(path: Path, data: ReportData, overwrite: bool = False) -> Path:
    """Write the page of `data` to `path`, whole or not at all; return `path`."""
    text = page(data)
    with replacing_file(Path(path), overwrite) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


def page(data: ReportData) -> str:
    """The HTML of a report: one file with its style and charts, without a script or a link."""
    template = Path(__file__).with_name("report_page.html").read_text(encoding="utf-8")
    sections = [
        _table_section(data),
        _perplexity_section(data),
        tasks_section(data),
        fidelity_section(data),
        recall_section(data),
        noise_section(data),
        bench_section(data),
        *(part for found in data.sweeps for part in sweep_sections(sweep_of(found))),
        plans_section(data),
        kept_section(data),
        _spectra_section(data),
        ranks_section(data),
        _loss_section(data),
        _time_section(data),
        _record_section(data),
    ]
    return Template(template).substitute(
        title=escape(data.title),
        verdict=escape(verdict(data.rows)),
        tiles=_tiles(data.rows),
        sections="\n".join(section for section in sections if section),
    )


def loss_curve(run_folder: Path) -> tuple[list[int], list[float]]:
    """Steps and mean training losses, in nats per token, of a run's TensorBoard files.

    A resumed run has several files; where they overlap, the newest holds.

    Raises:
        UserError: the run has no events with a loss.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    losses: dict[int, tuple[float, float]] = {}
    for folder in sorted({file.parent for file in Path(run_folder).glob("tb/**/events.out.*")}):
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
        if LOSS_TAG in events.Tags()["scalars"]:
            for event in events.Scalars(LOSS_TAG):
                newest = losses.get(event.step, (-math.inf, 0.0))
                losses[event.step] = max(newest, (event.wall_time, event.value))
    if not losses:
        raise UserError(f"{run_folder} has no loss curve: no TensorBoard events with {LOSS_TAG}")
    steps = sorted(losses)
    return steps, [losses[step][1] for step in steps]


def smoothed(values: Sequence[float], reach: int) -> list[float]:
    """Mean over `reach` neighbours on either side, NaN passed over.

    Windows shrink evenly at the start, where a loss is steep, and are cut off at the end.
    """
    result = []
    for middle in range(len(values)):
        first = middle - min(reach, middle)
        window = [v for v in values[first : 2 * middle - first + 1] if math.isfinite(v)]
        result.append(sum(window) / len(window) if window else math.nan)
    return result


def _tiles(rows: Mapping[str, Row]) -> str:
    """The changes that matter, from the dense model to the recovered one."""
    control = control_of(rows)
    if control is None or "recovered" not in rows:
        return ""
    specifications = (
        ("Recurrent state a sequence", "state_bytes", bytes_text),
        ("Held-out perplexity", "perplexity", short),
        ("Decoded tokens a second", "decode_tokens_per_second", lambda value: f"{value:,.0f}"),
        ("Parameters", "parameters", lambda value: f"{value:,.0f}"),
    )
    tiles = []
    for label, key, write in specifications:
        before, after = number(rows, control, key), number(rows, "recovered", key)
        if before and after is not None:
            tiles.append(
                f'<div><dt>{escape(label)}</dt><dd class="change">{change_text(before, after)}</dd>'
                f'<dd class="values">{write(before)} → {write(after)}</dd></div>'
            )
    note = f"From {described(control)} to the recovered one."
    return f'<dl class="tiles">{"".join(tiles)}</dl><p class="note">{note}</p>'


def _table_section(data: ReportData) -> str:
    if not data.rows:
        return ""
    heading = "All models on the same held-out text"
    return section(heading, models_note(data), scrolled(summary_table(data.rows)))


def _perplexity_section(data: ReportData) -> str:
    values = {name: perplexity(data.rows, name) for name in data.rows}
    known = {name: value for name, value in values.items() if value is not None}
    if not known:
        return ""
    log = max(known.values()) > LOG_SCALE_FROM * min(known.values())
    scale = (
        "The axis is logarithmic and starts at 1, so that a length is the loss in nats."
        if log
        else "The axis starts at 0."
    )
    control = control_of(data.rows)
    mark = perplexity(data.rows, control) if control else None
    dashed = f" The dashed line is {described(control)}." if control and mark else ""
    texts = {name: short(value) for name, value in known.items()}
    return section(
        "Held-out perplexity",
        f"{comparison(data.rows, data.method)} Lower is better. {scale}{dashed}".strip(),
        bars(known, LABELS, texts, log, mark),
    )


def _loss_section(data: ReportData) -> str:
    if not data.loss_curves:
        return ""
    later = {name: curve for name, curve in data.loss_curves.items() if name != "dense"}
    drawn = []
    if "dense" in data.loss_curves:
        drawn.append(_loss_panel("Pretraining", {"dense": data.loss_curves["dense"]}))
    if later:
        drawn.append(_loss_panel("After pruning, and the dense control", later))
    return section(
        "Training loss",
        "The line is a running mean, the faint one the loss of each logged step. The two panels "
        "have axes of their own.",
        panels(drawn),
    )


def _loss_panel(heading: str, curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> str:
    lines = []
    for name, (steps, losses) in curves.items():
        mean = smoothed(losses, reach=len(losses) // 20)
        lines.append(Line(name, LABELS.get(name, name), steps, mean, faint=losses))
    chart = line_chart(lines, "step", "loss, nats per token", f"Training loss: {heading}")
    return f"<h3>{escape(heading)}</h3>{chart}"


def _spectra_section(data: ReportData) -> str:
    layers = sorted({spectrum.layer for spectra in data.spectra.values() for spectrum in spectra})
    drawn = []
    for layer in layers:
        found = {
            name: spectrum
            for name, spectra in data.spectra.items()
            for spectrum in spectra
            if spectrum.layer == layer
        }
        drawn.append(_spectrum_panel(layer, found))
    if not drawn:
        return ""
    return section(
        "Singular values of the states",
        "Each state is a key-by-value matrix; its singular values are divided by the largest and "
        "averaged over heads. A line that falls fast belongs to a state that uses few of its "
        "directions. The stable rank is the sum of their squares over the largest square.",
        panels(drawn),
    )


def _spectrum_panel(layer: int, found: Mapping[str, Spectrum]) -> str:
    lines = [
        Line(
            name,
            LABELS.get(name, name),
            range(1, len(s.values) + 1),
            [max(v, 1e-8) for v in s.values],
        )
        for name, s in found.items()
    ]
    title = f"Layer {layer}"
    chart = line_chart(lines, "singular value, by size", "σ / largest σ", title, log_y=True)
    return f"<h3>{title}</h3>{_stable_ranks(found)}{chart}"


def _stable_ranks(found: Mapping[str, Spectrum]) -> str:
    ranks = ", ".join(
        f'<span class="m-{escape(name)}">{escape(LABELS.get(name, name))} '
        f"{spectrum.stable_rank:.1f} of {len(spectrum.values)}</span>"
        for name, spectrum in found.items()
        if math.isfinite(spectrum.stable_rank)
    )
    return f'<p class="ranks">Stable rank: {ranks}</p>' if ranks else ""


def _time_section(data: ReportData) -> str:
    stages = {name: value for name, value in data.seconds.items() if name != "total"}
    if not stages:
        return ""
    total = data.seconds.get("total", sum(stages.values()))
    texts = {name: f"{value:,.1f} s" for name, value in stages.items()}
    drawn = bars(stages, {name: name.replace("_", " ") for name in stages}, texts, colour="stage")
    processes = "1 process" if data.world_size == 1 else f"{data.world_size} processes"
    where = f", on {processes}" if data.world_size is not None else ""
    return section(
        "Where the time went",
        f"{total:,.1f} seconds in all{where}.",
        f'<div class="thin">{drawn}</div>',
    )


def _record_section(data: ReportData) -> str:
    run = {"seed": data.seed, "processes": data.world_size}
    known = {name: value for name, value in run.items() if value is not None}
    facts = {**known, **data.facts, **data.versions}
    pairs = "".join(
        f"<div><dt>{escape(str(name))}</dt><dd>{escape(str(value))}</dd></div>"
        for name, value in facts.items()
    )
    commands = "".join(f"<code>{escape(command)}\n</code>" for command in data.commands)
    shown = f"<pre>{commands}</pre>" if commands else ""
    return section("How it was made", "", f'{shown}<dl class="facts">{pairs}</dl>')
