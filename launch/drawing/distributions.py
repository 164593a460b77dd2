"""Pictures of how values are distributed: histogram, pairs of values, scatter."""

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from launch.drawing.figure import BOTTOM, HEIGHT, LEFT, TOP, WIDTH, axes, colour, picture
from launch.drawing.lines import LETTER, shortened

LOW, HIGH = "dense", "pruned"
"""Roles of the colours of low and of high rank."""


def histogram(
    values: Sequence[float], bound: float, x_label: str, title: str, unit: str = "heads"
) -> str:
    """Return an SVG of how often values occur, with those above `bound` in another colour.

    A dashed line marks the bound unless it is NaN. No bin has values from both sides of the bound.
    Without values the result is an empty string.
    """
    if not values:
        return ""
    edges = bin_edges(values, bound)
    # An edge belongs to the bin below it, as the bound does.
    counts = Counter(bisect_left(edges[1:-1], value) for value in values)

    def paint(figure: Any) -> None:
        ax = axes(figure)
        for place, (left, right) in enumerate(pairwise(edges)):
            role = HIGH if (left + right) / 2 > bound else LOW
            ax.bar((left + right) / 2, counts[place], 0.92 * (right - left), color=colour(role))
        ax.set_xlim(edges[0], edges[-1])
        ax.set(xlabel=x_label, ylabel=unit)
        ax.yaxis.get_major_locator().set_params(integer=True)
        if math.isfinite(bound):
            ax.axvline(bound, color=colour("soft"), ls=(0, (4, 3)), lw=1)

    return picture(title, paint)


def bin_edges(values: Sequence[float], bound: float) -> list[float]:
    """Return edges of bins of equal width over all values, shifted so that the bound is an edge.

    `values` must not be empty. Equal values get one bin; a NaN bound shifts nothing.
    """
    low, high = min(values), max(values)
    if high <= low:
        return [low - 0.5, low + 0.5]
    bins = min(24, max(6, round(2 * math.sqrt(len(values)))))
    width = (high - low) / bins
    start = low if math.isnan(bound) else bound - math.ceil((bound - low) / width) * width
    return [start + index * width for index in range(math.floor((high - start) / width) + 2)]


def pairs(
    rows: Mapping[str, tuple[float, float]],
    names: tuple[str, str],
    labels: tuple[str, str],
    title: str,
    roles: tuple[str, str] = ("dense", "pruned"),
) -> str:
    """Return an SVG with a row for each entry: two joined dots on an axis that starts at 0.

    Args:
        rows: the two values by label; without any the result is an empty string.
        names: the names of the first and of the second value, for the key.
        labels: what the rows and the values are.
        title: what the picture shows, for readers that do not see it.
        roles: the colours of the first and the second value.
    """
    if not rows:
        return ""
    step = min(26.0, max(11.0, 300 / len(rows)))

    def paint(figure: Any) -> None:
        ax = axes(figure, top=26)
        places = [place + 0.5 for place in range(len(rows))]
        first, second = ([pair[which] for pair in rows.values()] for which in (0, 1))
        ax.hlines(places, first, second, color=colour("soft"), lw=1)
        for values, role in ((first, roles[0]), (second, roles[1])):
            ax.plot(values, places, "o", color=colour(role), ms=7)
        ax.set(
            xlim=(0, max(*first, *second) * 1.06 or 1.0),
            ylim=(len(rows), 0),
            xlabel=labels[1],
            ylabel=labels[0],
        )
        ax.set_yticks(places, list(rows))
        ax.locator_params(axis="x", nbins=6)
        ax.grid(False, axis="y")
        ax.grid(True, axis="x")
        _key(figure, names, roles)

    return picture(title, paint, 26 + len(rows) * step + BOTTOM)


def scatter(
    points: Sequence[tuple[float, float]],
    labels: tuple[str, str],
    title: str,
    high: Sequence[bool] | None = None,
) -> str:
    """Return an SVG of points with the same scale on both axes, and the diagonal.

    Args:
        points: x and y; without any the result is an empty string.
        labels: what x and y are.
        title: what the picture shows, for readers that do not see it.
        high: whether each point is in the group of high rank; by default none is.
    """
    if not points:
        return ""
    values = [value for point in points for value in point]
    low, top = min(values), max(values)
    margin = 0.06 * (top - low) or 0.5
    extent = (low - margin, top + margin)
    chosen = [HIGH if is_high else LOW for is_high in high or [False] * len(points)]

    def paint(figure: Any) -> None:
        side = HEIGHT - BOTTOM - TOP
        ax = axes(figure, right=WIDTH - LEFT - side)
        ax.plot(extent, extent, color=colour("soft"), ls=(0, (4, 3)), lw=1)
        x, y = zip(*points, strict=True)
        ax.scatter(x, y, s=28, c=[colour(role) for role in chosen], alpha=0.75, lw=0)
        ax.set(xlim=extent, ylim=extent, xlabel=labels[0], ylabel=labels[1])

    return picture(title, paint)


def _key(figure: Any, names: tuple[str, str], roles: tuple[str, str]) -> None:
    """Write the key above the axes: each name behind a dot of its colour."""
    y, x = 1 - 10 / (72 * figure.get_figheight()), LEFT
    for name, role in zip(map(shortened, names), roles, strict=True):
        figure.text(x / WIDTH, y, "●", color=colour(role), va="center", size=12)
        figure.text((x + 14) / WIDTH, y, name, color=colour(role), va="center", weight=700)
        x += 30 + LETTER * len(name)
