"""The plots of a state-rank analysis, each an SVG that a page or a file of its own can hold."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from launch.drawing.distributions import histogram, pairs, scatter
from launch.drawing.heatmaps import extent_of, heat_map
from launch.drawing.lines import Line, line_chart

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
    """One plot: what it shows, and its picture as inline SVG."""

    title: str
    picture: str


@dataclass(frozen=True)
class Series:
    """An analysis, the name of what was analysed, and its colour in plots of two models."""

    label: str
    analysis: "Analysis"
    role: str = "pruned"


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
    return {name: plot for name, plot in found.items() if plot.picture}


def _heat_maps(models: Sequence[Series], metric: str) -> list[Plot]:
    """One for each model, with the same colours for the same values."""
    tables = [
        dict(zip(map(str, s.analysis.layers), s.analysis.mean(metric).tolist(), strict=True))
        for s in models
    ]
    extents = [extent_of(rows) for rows in tables]
    shared = (min(low for low, _ in extents), max(high for _, high in extents))
    found = []
    for series, rows in zip(models, tables, strict=True):
        title = f"{_name(metric)} by layer and head, {series.label}, {_after(series)}"
        found.append(Plot(title, heat_map(rows, ("layer", "head"), title, shared)))
    return found


def _over_time(series: Series, metric: str) -> Plot:
    times, means = series.analysis.times, series.analysis.values[metric].mean((0, 2))
    title = f"{_name(metric)} over time, mean over heads, {series.label}"
    lines = _layer_lines(series, [(times, row.tolist()) for row in means])
    return _over_tokens(title, lines, NAMES[metric])


def _spectra(series: Series) -> Plot:
    from pruning.state_rank import shares

    title = f"Singular values by layer, mean over heads, {series.label}, {_after(series)}"
    means = [shares(values).mean((0, 1)) for values in series.analysis.spectra]
    drawn = [(range(1, len(m) + 1), m.clamp(min=SMALLEST_DRAWN).tolist()) for m in means]
    label = "singular value, by size"
    lines = _layer_lines(series, drawn)
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
    return _over_tokens(title, lines, "agreement")


def _against(model: Series, against: Series, metric: str) -> Plot:
    here, there = (
        dict(zip(s.analysis.layers, s.analysis.mean(metric).mean(1).tolist(), strict=True))
        for s in (model, against)
    )
    rows = {
        str(layer): (there[layer], value)
        for layer, value in here.items()
        if math.isfinite(value) and math.isfinite(there.get(layer, math.nan))
    }
    title = f"{_name(metric)} by layer, mean over heads, {_after(model)}"
    names, roles = (against.label, model.label), (against.role, model.role)
    return Plot(title, pairs(rows, names, ("layer", NAMES[metric]), title, roles))


def _against_over_time(model: Series, against: Series, metric: str) -> Plot:
    title = f"{_name(metric)} over time, mean over layers and heads"
    lines = [
        Line(s.role, s.label, s.analysis.times, s.analysis.values[metric].mean((0, 1, 2)).tolist())
        for s in (against, model)
    ]
    return _over_tokens(title, lines, NAMES[metric])


def _data(model: Series, text: str, second: Series, metric: str) -> Plot:
    from pruning.state_rank import split

    ranks, others = (a.mean(metric).flatten() for a in (model.analysis, second.analysis))
    finite = ranks.isfinite() & others.isfinite()
    ranks, others = ranks[finite], others[finite]
    points = list(zip(ranks.tolist(), others.tolist(), strict=True))
    title = f"{_name(metric)} of each head on two texts, {_after(model)}"
    high = split(ranks).high.tolist()
    return Plot(title, scatter(points, (f"on {text}", f"on {second.label}"), title, high))


def _over_tokens(title: str, lines: Sequence[Line], y_label: str) -> Plot:
    """Lines over the number of tokens that were read."""
    return Plot(title, line_chart(lines, "tokens read", y_label, title, log_x=True))


def _layer_lines(
    series: Series, drawn: Sequence[tuple[Sequence[float], Sequence[float]]]
) -> list[Line]:
    """One line a layer from its x and y; only some are labelled if there is no room for all."""
    layers = series.analysis.layers
    last = max(len(layers) - 1, 1)
    shown = {round(i * last / (MOST_LABELS - 1)) for i in range(MOST_LABELS)}
    if len(layers) <= MOST_LABELS:
        shown = set(range(len(layers)))
    return [
        Line("other", f"layer {layer}" if place in shown else "", x, y, shade=place / last)
        for place, (layer, (x, y)) in enumerate(zip(layers, drawn, strict=True))
    ]


def _after(series: Series) -> str:
    return f"after {series.analysis.times[-1]:,} tokens"


def _name(metric: str) -> str:
    name = NAMES[metric]
    return name[:1].upper() + name[1:] if name[:1].isascii() else name
