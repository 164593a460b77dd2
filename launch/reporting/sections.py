"""Sections of a report, one function each; a section with nothing to show is left out."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from launch.drawing.heatmaps import channel_grid
from launch.drawing.lines import Line, line_chart
from launch.reporting.blocks import (
    Bars,
    Folded,
    Panel,
    Panels,
    Record,
    Section,
    TableBlock,
    bars,
    panels,
)
from launch.reporting.data import RankAnalysis, Recall, ReportData
from launch.reporting.sentences import (
    LABELS,
    bytes_text,
    comparison,
    control_of,
    described,
    perplexity,
    short,
)
from launch.reporting.tables import (
    FIDELITY_NOTE,
    NOISE_NOTE,
    RECALL_NOTE,
    bench_heading,
    label,
    models_note,
    noise_table,
    plans_table,
    ranks_table,
    recall_table,
    scores_table,
    summary_table,
)
from launch.speed.bench_table import bench_table, figure, kernel_lines

LOG_SCALE_FROM = 6.0
"""Ratio of the largest perplexity to the smallest above which bars are logarithmic."""

SMALLEST_DRAWN = 1e-8
"""Singular values, over the largest, below this are fp32 noise and drawn at it."""

MEASURES = {
    "prefill": "Reading prompts, tokens a second",
    "decode": "Decoding, tokens a second",
    "train_step": "Training step, milliseconds",
    "state_bytes": "Recurrent state a sequence",
    "train_peak_bytes": "Peak memory of a training step",
}
"""Measures of a benchmark that have bars beside the table."""

KEPT_WORDS = {
    "key": (
        "Kept key channels",
        "channels a head",
        "A row is a key head, a column one of its channels",
    ),
    "value": (
        "Kept value channels",
        "value channels",
        "A column is a channel, the same one in every head of the layer",
    ),
    "head": ("Kept heads", "heads", "A column is a key head, with the value heads that share it"),
}
"""By kind of space: heading, what is counted, and what a picture means."""


def models(data: ReportData) -> Iterator[Section]:
    """The table of all models, and bars of their perplexity."""
    if data.rows:
        heading = "All models on the same held-out text"
        yield Section(heading, models_note(data), [TableBlock(summary_table(data.rows))])
    values = {name: perplexity(data.rows, name) for name in data.rows}
    known = {name: value for name, value in values.items() if value is not None}
    if not known:
        return
    log = max(known.values()) > LOG_SCALE_FROM * min(known.values())
    scale = (
        "The axis is logarithmic and starts at 1, so that a length is the loss in nats."
        if log
        else "The axis starts at 0."
    )
    control = control_of(data.rows)
    mark = perplexity(data.rows, control) if control else None
    dashed = f" The dashed line is {described(control)}." if mark else ""
    note = f"{comparison(data.rows, data.method)} Lower is better. {scale}{dashed}".strip()
    texts = {name: short(value) for name, value in known.items()}
    yield Section("Held-out perplexity", note, [bars(known, LABELS, texts, log, mark)])


def scores(data: ReportData) -> Iterator[Section]:
    """Tasks, fidelity, recall and query noise."""
    if data.tasks:
        note = "± is the standard error of a score."
        yield Section("Tasks", note, [TableBlock(scores_table(data.tasks, data.rows))])
    if data.fidelity:
        table = scores_table(data.fidelity, data.rows)
        yield Section("Fidelity to the dense model", FIDELITY_NOTE, [TableBlock(table)])
    if data.recall:
        drawn = panels([Panel(r.heading, _recall_chart(r)) for r in data.recall], "charts")
        tables = [TableBlock(recall_table(r), heading=r.heading) for r in data.recall]
        yield Section("Recall", RECALL_NOTE, [drawn, Folded("The same in numbers", tables)])
    if data.query_noise:
        yield Section("Query noise", NOISE_NOTE, [TableBlock(noise_table(data.query_noise))])


def speed(data: ReportData) -> Iterator[Section]:
    """A section for each benchmark: bars, and the table of all measures."""
    for record in data.bench:
        drawn = [
            Panel(heading, blocks=[_bars(measure) for measure in found])
            for name, heading in MEASURES.items()
            if (found := [m for m in record["measures"] if m["name"] == name and m["values"]])
        ]
        table = TableBlock(bench_table(record), "wide")
        note = " ".join(kernel_lines(record))
        yield Section(bench_heading(record), note, [Panels(drawn, thin=True), table])


def pruned(data: ReportData) -> Iterator[Section]:
    """The plans, and what the first one kept, a section for each kind of space."""
    if data.plans:
        note = "From plan.json, which the pruned model keeps."
        table = TableBlock(plans_table(data.plans), "wide")
        yield Section("What was pruned, and how", note, [table])
    for kind, (heading, of, meaning) in KEPT_WORDS.items():
        drawn = []
        for layer in (layer for layer in data.kept if layer.kind == kind):
            counts = sorted({len(channels) for channels in layer.kept}) or [0]
            count = " to ".join(map(str, (counts[0], counts[-1])[: len(counts)]))
            title = f"Layer {layer.layer}: {count} of {layer.head_dim} {of}"
            drawn.append(Panel(title, channel_grid(layer.kept, layer.head_dim, title)))
        if drawn:
            note = f"{meaning}; {data.method} kept the filled ones."
            yield Section(heading, note, [panels(drawn)])


def ranks(data: ReportData) -> Iterator[Section]:
    """Singular values of the states, and a section for each analysis of their ranks."""
    layers = sorted({spectrum.layer for spectra in data.spectra.values() for spectrum in spectra})
    if layers:
        note = (
            "Each state is a key-by-value matrix; its singular values are divided by the largest "
            "and averaged over heads. A line that falls fast belongs to a state that uses few of "
            "its directions. The stable rank is the sum of their squares over the largest square."
        )
        drawn = panels([_spectrum_panel(data, layer) for layer in layers])
        yield Section("Singular values of the states", note, [drawn])
    for analysis in data.ranks:
        yield _analysis(analysis)


def training(data: ReportData) -> Iterator[Section]:
    """Loss curves, and where the time went."""
    if data.loss_curves:
        later = {name: curve for name, curve in data.loss_curves.items() if name != "dense"}
        parts = {
            "Pretraining": {n: c for n, c in data.loss_curves.items() if n == "dense"},
            "After pruning, and the dense control": later,
        }
        note = (
            "The line is a running mean, the faint one the loss of each logged step. The two "
            "panels have axes of their own."
        )
        drawn = [Panel(h, _loss_chart(h, curves)) for h, curves in parts.items() if curves]
        yield Section("Training loss", note, [panels(drawn)])
    stages = {name: value for name, value in data.seconds.items() if name != "total"}
    if stages:
        total = data.seconds.get("total", sum(stages.values()))
        processes = "1 process" if data.world_size == 1 else f"{data.world_size} processes"
        where = f", on {processes}" if data.world_size is not None else ""
        labels = {name: name.replace("_", " ") for name in stages}
        texts = {name: f"{value:,.1f} s" for name, value in stages.items()}
        drawn_times = bars(stages, labels, texts, role="soft", thin=True)
        yield Section("Where the time went", f"{total:,.1f} seconds in all{where}.", [drawn_times])


def made(data: ReportData) -> Iterator[Section]:
    """The commands and everything else that belongs to the record."""
    run = {"seed": data.seed, "processes": data.world_size}
    known = {name: value for name, value in run.items() if value is not None}
    record = Record(data.commands, {**known, **data.facts, **data.versions})
    yield Section("How it was made", "", [record])


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


def _loss_chart(heading: str, curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> str:
    lines = [
        Line(name, label(name), steps, smoothed(losses, len(losses) // 20), faint=losses)
        for name, (steps, losses) in curves.items()
    ]
    return line_chart(lines, "step", "loss, nats per token", f"Training loss: {heading}")


def _spectrum_panel(data: ReportData, layer: int) -> Panel:
    found = {n: s for n, spectra in data.spectra.items() for s in spectra if s.layer == layer}
    lines = [
        Line(
            name,
            label(name),
            range(1, len(s.values) + 1),
            [max(v, SMALLEST_DRAWN) for v in s.values],
        )
        for name, s in found.items()
    ]
    words = [
        (name, f"{label(name)} {s.stable_rank:.1f} of {len(s.values)}")
        for name, s in found.items()
        if math.isfinite(s.stable_rank)
    ]
    title = f"Layer {layer}"
    chart = line_chart(lines, "singular value, by size", "σ / largest σ", title, log_y=True)
    return Panel(title, chart, words=words, words_label="Stable rank:")


def _recall_chart(recall: Recall) -> str:
    lines = [
        Line(name, label(name), x, [100 * accuracy for accuracy in y])
        for name, (x, y) in recall.curves.items()
    ]
    if recall.chance is not None:
        xs = [x for line in lines for x in line.x]
        lines.append(Line("soft", "chance", [min(xs), max(xs)], [100 * recall.chance] * 2))
    extent = (-3.0, 103.0)
    return line_chart(lines, recall.x_label, "accuracy, %", recall.heading, y_extent=extent)


def _analysis(analysis: RankAnalysis) -> Section:
    drawn = [Panel(plot.title, plot.picture) for plot in analysis.plots]
    table = Folded("Means by layer, in numbers", [TableBlock(ranks_table(analysis))])
    return Section(analysis.heading, analysis.note, [panels(drawn, "plots"), table])


def _bars(measure: Mapping[str, Any]) -> Bars:
    """Bars of one size of one measure."""
    values = {name: value["median"] for name, value in measure["values"].items()}
    write = bytes_text if measure["unit"] == "bytes" else figure
    labels = {name: label(name) for name in values}
    sizes = {
        "decode": lambda: f"batch {measure['batch_size']}",
        "prefill": lambda: f"{measure['length']:,} tokens",
    }
    heading = sizes.get(measure["name"], lambda: "")()
    return bars(values, labels, {n: write(v) for n, v in values.items()}, heading=heading)
