"""The pictures and bars of a report, each under its heading."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from launch.drawing.heatmaps import channel_grid
from launch.drawing.lines import Line, line_chart
from launch.reporting.data import Measured, RankAnalysis, ReportData
from launch.reporting.losses import loss_chart
from launch.reporting.render import Bars, Panel
from launch.reporting.sentences import bytes_text, short
from launch.speed.bench_table import figure

LOG_SCALE_FROM = 6.0
"""Bars are logarithmic if the largest perplexity over the smallest is above this."""

SMALLEST_DRAWN = 1e-8
"""Smaller singular values, relative to the largest, are fp32 noise and drawn at this value."""

MEASURES = {
    "prefill": "Reading prompts, tokens a second",
    "decode": "Decoding, tokens a second",
    "train_step": "Training step, milliseconds",
    "state_bytes": "Recurrent state a sequence",
    "train_peak_bytes": "Peak memory of a training step",
}
"""Measures of a benchmark that have bars beside the table."""

COUNTED = {
    "key": "channels a head",
    "value": "value channels",
    "head": "heads",
    "value-head": "value heads a group",
}
"""What is counted of each kind of space."""


def perplexity_bars(text: Measured, mark: str | None) -> Bars:
    """Return bars of the perplexities on a text, marked at that of the model `mark`."""
    known = {n: r["perplexity"] for n, r in text.records.items() if math.isfinite(r["perplexity"])}
    return Bars(
        known,
        {name: short(value) for name, value in known.items()},
        mark=known.get(mark or ""),
        log=max(known.values(), default=1.0) > LOG_SCALE_FROM * min(known.values(), default=1.0),
    )


def time_bars(data: ReportData) -> Bars:
    """Return bars of the seconds of each stage; `total` has none."""
    stages = {n.replace("_", " "): value for n, value in data.seconds.items() if n != "total"}
    return Bars(stages, {name: f"{value:,.1f} s" for name, value in stages.items()}, "soft")


def recall_panels(data: ReportData) -> Iterator[Panel]:
    """Yield charts of accuracy against what makes recall hard, with a line for each model."""
    for recall in data.recall:
        lines = [
            Line(data.colour(name), name, x, [100 * accuracy for accuracy in y])
            for name, (x, y) in recall.curves.items()
        ]
        if recall.chance is not None:
            xs = [x for line in lines for x in line.x]
            lines.append(Line("soft", "chance", [min(xs), max(xs)], [100 * recall.chance] * 2))
        extent, title = (-3.0, 103.0), recall.heading
        chart = line_chart(lines, recall.x_label, "accuracy, %", title, y_extent=extent)
        yield Panel(title, chart)


def bench_panels(record: Mapping[str, Any]) -> Iterator[Panel]:
    """Yield a panel for each of `MEASURES`, with a block of bars for each size."""
    for name, heading in MEASURES.items():
        found = [m for m in record["measures"] if m["name"] == name and m["values"]]
        if found:
            yield Panel(heading, bars=[_bench_bars(measure) for measure in found])


def _bench_bars(measure: Mapping[str, Any]) -> Bars:
    values = {name: value["median"] for name, value in measure["values"].items()}
    write = bytes_text if measure["unit"] == "bytes" else figure
    size = ""
    if measure["name"] == "decode":
        size = f"batch {measure['batch_size']}"
    if measure["name"] == "prefill":
        size = f"{measure['length']:,} tokens"
    return Bars(values, {name: write(value) for name, value in values.items()}, heading=size)


def kept_panels(data: ReportData) -> dict[str, list[Panel]]:
    """Return pictures of what the plan kept, one for each layer, by kind of space."""
    found: dict[str, list[Panel]] = {kind: [] for kind in COUNTED}
    for layer in data.kept:
        counts = sorted({len(channels) for channels in layer.kept}) or [0]
        count = " to ".join(map(str, (counts[0], counts[-1])[: len(counts)]))
        title = f"Layer {layer.layer}: {count} of {layer.head_dim} {COUNTED[layer.kind]}"
        picture = channel_grid(layer.kept, layer.head_dim, title)
        found[layer.kind].append(Panel(title, picture))
    return found


def spectrum_panels(data: ReportData) -> Iterator[Panel]:
    """Yield the singular values of the states: a panel for each layer, a line for each model."""
    for layer in sorted({s.layer for spectra in data.spectra.values() for s in spectra}):
        found = {n: s for n, spectra in data.spectra.items() for s in spectra if s.layer == layer}
        lines = []
        for name, s in found.items():
            drawn = [max(value, SMALLEST_DRAWN) for value in s.values]
            lines.append(Line(data.colour(name), name, range(1, len(drawn) + 1), drawn))
        title, x_label = f"Layer {layer}", "singular value, by size"
        yield Panel(
            title,
            line_chart(lines, x_label, "σ / largest σ", title, log_y=True),
            stable_ranks={
                name: f"{s.stable_rank:.1f} of {len(s.values)}"
                for name, s in found.items()
                if math.isfinite(s.stable_rank)
            },
        )


def rank_panels(analysis: RankAnalysis) -> list[Panel]:
    """Return the plots of an analysis of ranks."""
    return [Panel(plot.title, plot.picture) for plot in analysis.plots]


def loss_panels(data: ReportData) -> Iterator[Panel]:
    """Yield training losses: of models trained from scratch, then of those that were trained on."""
    later = {n for n in data.loss_curves if data.lineages and data.lineages[n].parent}
    for heading, chosen in (
        ("Training from scratch", [n for n in data.loss_curves if n not in later]),
        ("Training on", [n for n in data.loss_curves if n in later]),
    ):
        if chosen:
            curves = {name: data.loss_curves[name] for name in chosen}
            yield Panel(heading, loss_chart(heading, curves, data.colour))
