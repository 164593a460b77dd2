"""The plots of a state-rank analysis, each an SVG that a page or a file of its own can hold."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from launch.drawing.charts import Line, line_chart
from launch.drawing.heatmaps import extent_of, heat_map, histogram, pairs, scatter

if TYPE_CHECKING:
    from pruning.states.analysis import Analysis

NAMES = {
    "stable_rank": "stable rank",
    "utilisation": "rank utilisation",
    "threshold_rank": "threshold rank",
    "entropy_rank": "entropy rank",
    "nuclear_norm": "nuclear norm",
    "sigma_1": "largest singular value",
    "sigma_ratio": "σ₁ / σ_d",
    "decay": "mean decay α",
    "beta": "mean β",
}
"""Metrics as a reader sees them."""

SMALLEST_DRAWN = 1e-8
MOST_LABELS = 8
"""Lines of layers that are labelled."""


class Plot(NamedTuple):
    """One plot: what it shows, and its drawing as inline SVG."""

    title: str
    drawing: str


@dataclass(frozen=True)
class Series:
    """An analysis and the name of what was analysed."""

    label: str
    analysis: "Analysis"


def plots(
    model: Series,
    metric: str,
    against: Series | None = None,
    second: tuple[str, Series] | None = None,
) -> dict[str, Plot]:
    """All plots that apply and have something to draw, by file name without suffix.

    Args:
        model: the analysis of the model.
        metric: what ranks the heads; a key of `NAMES`.
        against: another model on the same text.
        second: the name of the text, and the same model on the text that labels this series.
    """
    maps = _heat_maps([model, *([against] if against else [])], metric)
    found = {
        "heat_map": maps[0],
        "rank_over_time": _over_time(model, metric),
        "spectra": _spectra(model),
        "heads": _heads(model, metric),
        "stability": _stability(model, metric),
    }
    if against is not None:
        found["heat_map_against"] = maps[1]
        found["against"] = _against(model, against, metric)
        found["against_over_time"] = _against_over_time(model, against, metric)
    if second is not None:
        found["data"] = _data(model, *second, metric)
    return {name: plot for name, plot in found.items() if plot.drawing.startswith("<svg")}


def _heat_maps(models: Sequence[Series], metric: str) -> list[Plot]:
    """One for each model, with the same colours for the same values."""
    tables = [_table(series, metric) for series in models]
    extents = [extent_of(rows) for rows in tables]
    shared = (min(low for low, _ in extents), max(high for _, high in extents))
    found = []
    for series, rows in zip(models, tables, strict=True):
        title = f"{_name(metric)} by layer and head, {series.label}, {_after(series)}"
        found.append(Plot(title, heat_map(rows, ("layer", "head"), title, shared)))
    return found


def _table(series: Series, metric: str) -> dict[str, list[float]]:
    last = series.analysis.mean(metric).tolist()
    return {str(layer): row for layer, row in zip(series.analysis.layers, last, strict=True)}


def _over_time(series: Series, metric: str) -> Plot:
    analysis = series.analysis
    means = analysis.values[metric].mean((0, 2))
    title = f"{_name(metric)} over time, mean over heads, {series.label}"
    lines = [
        Line("other", label, analysis.times, row.tolist(), colour=colour)
        for (label, colour), row in zip(_layers(analysis.layers), means, strict=True)
    ]
    return Plot(title, line_chart(lines, "tokens read", NAMES[metric], title, log_x=True))


def _spectra(series: Series) -> Plot:
    from pruning.state_rank import shares

    analysis = series.analysis
    title = f"Singular values by layer, mean over heads, {series.label}, {_after(series)}"
    lines = []
    looks = _layers(analysis.layers)
    for (label, colour), values in zip(looks, analysis.spectra, strict=True):
        mean = shares(values).mean((0, 1)).tolist()
        drawn = [max(value, SMALLEST_DRAWN) for value in mean]
        lines.append(Line("other", label, range(1, len(drawn) + 1), drawn, colour=colour))
    label = "singular value, by size"
    return Plot(title, line_chart(lines, label, "σ / largest σ", title, log_y=True))


def _heads(series: Series, metric: str) -> Plot:
    from pruning.state_rank import split

    ranks = series.analysis.mean(metric).flatten()
    ranks = ranks[ranks.isfinite()]
    groups = split(ranks)
    counts = f"{int((~groups.high).sum())} of low and {int(groups.high.sum())} of high rank"
    shown = counts if math.isfinite(groups.bound) else "all alike"
    title = f"{_name(metric)} of all heads, {series.label}, {_after(series)}: {shown}"
    return Plot(title, histogram(ranks.tolist(), groups.bound, NAMES[metric], title))


def _stability(series: Series, metric: str) -> Plot:
    from pruning.state_rank import cosine, spearman

    analysis = series.analysis
    last, norms = analysis.mean(metric).flatten(), analysis.mean("nuclear_norm").flatten()
    ranks, cosines = [], []
    for time in range(len(analysis.times)):
        ranks.append(spearman(analysis.mean(metric, time).flatten(), last))
        cosines.append(cosine(analysis.mean("nuclear_norm", time).flatten(), norms))
    title = f"Heads after t tokens compared with those {_after(series)}, {series.label}"
    lines = [
        Line("dense", "Spearman, rank", analysis.times, ranks),
        Line("pruned", "cosine, norm", analysis.times, cosines),
    ]
    return Plot(title, line_chart(lines, "tokens read", "agreement", title, log_x=True))


def _against(model: Series, against: Series, metric: str) -> Plot:
    here, there = (dict(_by_layer(series, metric)) for series in (model, against))
    rows = {
        str(layer): (there[layer], value)
        for layer, value in here.items()
        if math.isfinite(value) and math.isfinite(there.get(layer, math.nan))
    }
    title = f"{_name(metric)} by layer, mean over heads, {_after(model)}"
    return Plot(title, pairs(rows, (against.label, model.label), ("layer", NAMES[metric]), title))


def _against_over_time(model: Series, against: Series, metric: str) -> Plot:
    title = f"{_name(metric)} over time, mean over layers and heads"
    lines = [
        Line(name, series.label, series.analysis.times, _over_all(series, metric))
        for name, series in (("dense", against), ("pruned", model))
    ]
    return Plot(title, line_chart(lines, "tokens read", NAMES[metric], title, log_x=True))


def _over_all(series: Series, metric: str) -> list[float]:
    return series.analysis.values[metric].mean((0, 1, 2)).tolist()


def _data(model: Series, text: str, second: Series, metric: str) -> Plot:
    from pruning.state_rank import split

    ranks, others = (a.mean(metric).flatten() for a in (model.analysis, second.analysis))
    finite = ranks.isfinite() & others.isfinite()
    ranks, others = ranks[finite], others[finite]
    points = list(zip(ranks.tolist(), others.tolist(), strict=True))
    title = f"{_name(metric)} of each head on two texts, {_after(model)}"
    high = split(ranks).high.tolist()
    return Plot(title, scatter(points, (f"on {text}", f"on {second.label}"), title, high))


def _by_layer(series: Series, metric: str) -> list[tuple[int, float]]:
    means = series.analysis.mean(metric).mean(1).tolist()
    return list(zip(series.analysis.layers, means, strict=True))


def _layers(layers: Sequence[int]) -> list[tuple[str, str]]:
    """For each layer its label, empty where there is no room for all, and its colour."""
    last = max(len(layers) - 1, 1)
    shown = {round(i * last / (MOST_LABELS - 1)) for i in range(MOST_LABELS)}
    if len(layers) <= MOST_LABELS:
        shown = set(range(len(layers)))
    return [
        (f"layer {layer}" if place in shown else "", f"hsl({200 + 150 * place / last:.0f} 65% 50%)")
        for place, layer in enumerate(layers)
    ]


def _after(series: Series) -> str:
    return f"after {series.analysis.times[-1]:,} tokens"


def _name(metric: str) -> str:
    name = NAMES[metric]
    return name[:1].upper() + name[1:] if name[:1].isascii() else name
