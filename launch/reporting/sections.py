"""Sections of a report about what pruning did: the plan, tasks, recall, ranks, speed and memory."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from launch.drawing.bars import bars
from launch.drawing.charts import Line, line_chart
from launch.drawing.table import Table
from launch.reporting.data import RankAnalysis, Recall, ReportData
from launch.reporting.page_parts import inline_drawing, panels, section
from launch.reporting.sentences import bytes_text
from launch.reporting.tables import (
    FIDELITY_NOTE,
    NOISE_NOTE,
    RECALL_NOTE,
    bench_heading,
    label,
    noise_table,
    plans_table,
    ranks_table,
    recall_table,
    scores_table,
)
from launch.speed.bench_table import bench_table, figure, kernel_lines

DRAWN = {
    "prefill": "Reading prompts, tokens a second",
    "decode": "Decoding, tokens a second",
    "train_step": "Training step, milliseconds",
    "state_bytes": "Recurrent state a sequence",
    "train_peak_bytes": "Peak memory of a training step",
}
"""Measures of a benchmark that have bars beside the table."""


def plans_section(data: ReportData) -> str:
    if not data.plans:
        return ""
    note = "From plan.json, which the pruned model keeps."
    return section("What was pruned, and how", note, scrolled(plans_table(data.plans), "facts-of"))


def tasks_section(data: ReportData) -> str:
    if not data.tasks:
        return ""
    note = "± is the standard error of a score."
    return section("Tasks", note, scrolled(scores_table(data.tasks, data.rows)))


def fidelity_section(data: ReportData) -> str:
    if not data.fidelity:
        return ""
    table = scores_table(data.fidelity, data.rows)
    return section("Fidelity to the dense model", FIDELITY_NOTE, scrolled(table))


def recall_section(data: ReportData) -> str:
    if not data.recall:
        return ""
    drawn = [f"<h3>{escape(r.heading)}</h3>{_recall_chart(r)}" for r in data.recall]
    tables = "".join(
        f"<h3>{escape(r.heading)}</h3>{scrolled(recall_table(r))}" for r in data.recall
    )
    folded = f"<details><summary>The same in numbers</summary>{tables}</details>"
    return section("Recall", RECALL_NOTE, panels(drawn, "charts") + folded)


def noise_section(data: ReportData) -> str:
    if not data.query_noise:
        return ""
    return section("Query noise", NOISE_NOTE, scrolled(noise_table(data.query_noise)))


def ranks_section(data: ReportData) -> str:
    return "".join(_analysis(found) for found in data.ranks)


def bench_section(data: ReportData) -> str:
    return "".join(_bench(record) for record in data.bench)


def scrolled(table: Table, kind: str = "") -> str:
    """A table that scrolls inside the page where it is wider."""
    return f'<div class="scroll {kind}">{table.html()}</div>'.replace(' "', '"')


def _recall_chart(recall: Recall) -> str:
    lines = [
        Line(name, label(name), x, [100 * accuracy for accuracy in y])
        for name, (x, y) in recall.curves.items()
    ]
    if recall.chance is not None:
        xs = [x for line in lines for x in line.x]
        ends = [min(xs), max(xs)]
        lines.append(Line("stage", "chance", ends, [100 * recall.chance] * 2))
    heading, x_label = recall.heading, recall.x_label
    return line_chart(lines, x_label, "accuracy, %", heading, y_extent=(-3, 103))


def _analysis(analysis: RankAnalysis) -> str:
    drawn = [
        f"<h3>{escape(figure_.title)}</h3>{inline_drawing(figure_.svg)}"
        for figure_ in analysis.figures
    ]
    table = scrolled(ranks_table(analysis))
    folded = f"<details><summary>Means by layer, in numbers</summary>{table}</details>"
    return section(analysis.heading, analysis.note, panels(drawn, "plots") + folded)


def _bench(record: Mapping[str, Any]) -> str:
    drawn = "".join(
        f"<div><h3>{escape(heading)}</h3>{_bars(measures)}</div>"
        for heading, measures in _drawn(record)
    )
    return section(
        bench_heading(record),
        " ".join(kernel_lines(record)),
        f'<div class="panels thin">{drawn}</div>{scrolled(bench_table(record), "wide")}',
    )


def _drawn(record: Mapping[str, Any]) -> list[tuple[str, Sequence[Mapping[str, Any]]]]:
    found: list[tuple[str, Sequence[Mapping[str, Any]]]] = []
    for name, heading in DRAWN.items():
        measures = [m for m in record["measures"] if m["name"] == name and m["values"]]
        if measures:
            found.append((heading, measures))
    return found


def _bars(measures: Sequence[Mapping[str, Any]]) -> str:
    """Bars of all sizes of one measure, a block for each size."""
    blocks = []
    for measure in measures:
        values = {name: value["median"] for name, value in measure["values"].items()}
        unit = measure["unit"]
        write = bytes_text if unit == "bytes" else figure
        labels = {name: label(name) for name in values}
        texts = {name: write(value) for name, value in values.items()}
        size = _size(measure)
        heading = f'<p class="ranks">{escape(size)}</p>' if size else ""
        blocks.append(heading + bars(values, labels, texts))
    return "".join(blocks)


def _size(measure: Mapping[str, Any]) -> str:
    if measure["name"] == "decode":
        return f"batch {measure['batch_size']}"
    if measure["name"] == "prefill":
        return f"{measure['length']:,} tokens"
    return ""
