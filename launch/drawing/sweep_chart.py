"""Charts of a sweep: perplexity against the part of the state that was removed, a line a method.

The axis of perplexity is logarithmic, so that equal distances are equal losses in nats. A method
that draws at random has a band of one standard deviation to either side.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from launch.drawing.figure import LEFT, SERIES, WIDTH, axes, colour, picture, set_ticks
from launch.drawing.lines import Line, end_labels, room_for_labels

MANTISSAS = ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 5.0, 7.0))
"""Choices of ticks in a decade; the first that gives `FEWEST_TICKS` is used."""

FEWEST_TICKS = 4
NUMBER_WIDTH = 34
"""Points that a number below an axis takes, with the gap beside it."""

MARGIN = 0.08
"""Share of the logarithmic extent that is left free above and below."""

Row = Mapping[str, Any]


def sweep_chart(
    rows: Sequence[Row],
    stage: str,
    dense: float | None,
    colours: Mapping[str, int],
    title: str,
    what: str = "perplexity",
) -> str:
    """Return an SVG of the rows of one kind of space; an empty string if none was measured.

    Args:
        rows: of `launch.sweeping.tables.collect_rows`.
        stage: `before` or `recovered`.
        dense: perplexity of the control, drawn as a dashed line.
        colours: the number of the colour of each method; a method without one is drawn as random.
        title: for readers that do not see it.
        what: the figure that the rows have for the stage.
    """
    rows = [row for row in rows if _is_drawn(row, stage)]
    if not rows:
        return ""
    methods = dict.fromkeys(row["method"] for row in rows)
    lines = [_line(method, rows, stage, colours) for method in methods]
    right = room_for_labels([*methods, "dense"])

    def paint(figure: Any) -> None:
        ax = axes(figure, right=right)
        _set_scales(ax, rows, stage, dense, WIDTH - LEFT - right)
        labelled = list(lines)
        for line in lines:
            ax.plot(line.x, line.y, "o-", color=line.colour, lw=2, ms=5, clip_on=False)
            _draw_band(ax, line, _of(rows, line.label), stage)
        if dense is not None:
            ends = ax.get_xlim()
            labelled.append(Line("ink", "dense", ends, (dense, dense)))
            ax.axhline(dense, color=colour("ink"), lw=1.5, ls=(0, (5, 4)))
        ax.set(xlabel="state removed, %", ylabel=what)
        end_labels(ax, labelled)

    return picture(title, paint)


def log_ticks(low: float, high: float) -> tuple[float, ...]:
    """Return round numbers from `low` > 0 to `high`, spread about evenly on a logarithmic axis."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for mantissas in MANTISSAS:
        marks = [m * 10.0**power for power in decades for m in mantissas]
        inside = tuple(mark for mark in marks if low <= mark <= high)
        if len(inside) >= FEWEST_TICKS:
            return inside
    from matplotlib.ticker import MaxNLocator

    found = MaxNLocator(6).tick_values(low, high)
    return tuple(float(tick) for tick in found if low <= tick <= high)


def _is_drawn(row: Row, stage: str) -> bool:
    value = row.get(stage)
    return row.get("removed") is not None and value is not None and math.isfinite(value)


def _of(rows: Sequence[Row], method: str) -> list[Row]:
    """Return the rows of a method, by the part of the state that was removed."""
    return sorted((r for r in rows if r["method"] == method), key=lambda r: r["removed"])


def _line(method: str, rows: Sequence[Row], stage: str, colours: Mapping[str, int]) -> Line:
    own, number = _of(rows, method), colours.get(method)
    role = "random" if number is None else SERIES[number % len(SERIES)]
    x = [100 * row["removed"] for row in own]
    return Line(role, method, x, [row[stage] for row in own])


def _set_scales(
    ax: Any, rows: Sequence[Row], stage: str, dense: float | None, width: float
) -> None:
    values = [bound for row in rows for bound in _bounds(row, stage)]
    values += [] if dense is None else [dense]
    factor = max(max(values) / min(values), 1.02) ** MARGIN
    ax.set_yscale("log")
    ax.set_ylim(min(values) / factor, max(values) * factor)
    set_ticks(ax.yaxis, log_ticks(*ax.get_ylim()))
    counts = Counter(round(100 * row["removed"], 1) for row in rows)
    first, last = min(counts), max(counts)
    first, last = (first, last) if len(counts) > 1 else (first - 5, first + 5)
    ax.set_xlim(first, last)
    set_ticks(ax.xaxis, _apart(counts, NUMBER_WIDTH * (last - first) / width))


def _apart(counts: Mapping[float, int], gap: float) -> tuple[float, ...]:
    """Return places that lie more than `gap` apart; those with many points are chosen first."""
    found: list[float] = []
    for x in sorted(counts, key=lambda x: (-counts[x], x)):
        if all(abs(x - other) > gap for other in found):
            found.append(x)
    return tuple(sorted(found))


def _bounds(row: Row, stage: str) -> tuple[float, float]:
    """Return the ends of the band: one standard deviation below and above the perplexity."""
    value, deviation = row[stage], row.get(f"{stage}_spread") or 0.0
    # A deviation as large as the mean would leave a logarithmic axis.
    return max(value - deviation, value / 2), value + deviation


def _draw_band(ax: Any, line: Line, rows: Sequence[Row], stage: str) -> None:
    if not any(row.get(f"{stage}_spread") for row in rows):
        return
    low, high = zip(*(_bounds(row, stage) for row in rows), strict=True)
    if len(rows) == 1:
        ax.vlines(line.x, low, high, color=line.colour, lw=8, alpha=0.16)
    else:
        ax.fill_between(line.x, low, high, color=line.colour, lw=0, alpha=0.16)
