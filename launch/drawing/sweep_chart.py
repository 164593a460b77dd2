"""Charts of a sweep: perplexity against the part of the state that was removed, a line a method.

The axis of perplexity is logarithmic, so that equal distances are equal losses in nats. A method
that draws at random has a band of one standard deviation to either side.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launch.drawing.charts import (
    BOTTOM,
    HEIGHT,
    LABEL_WIDTH,
    LEFT,
    TOP,
    WIDTH,
    Axis,
    Line,
    axis_x,
    axis_y,
    end_labels,
    looks,
    round_numbers,
    svg,
)

INK = "var(--ink)"
COLOURS = 10
"""Colours `--s0` to `--s9` of the page."""

MANTISSAS = ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 5.0, 7.0))
"""Ticks in a decade, ever more of them."""

FEWEST_TICKS = 4
NUMBER_WIDTH = 34
"""Pixels that a number below an axis takes, with the gap beside it."""

MARGIN = 0.08
"""Of the logarithmic extent, above and below."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class MarkedAxis(Axis):
    """An axis with its ticks given; where it is logarithmic, they are written out as numbers."""

    marks: tuple[float, ...] = ()
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        if not self.logarithmic:
            return super().__call__(value)
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        return list(self.marks)


def sweep_chart(
    rows: Sequence[Row], stage: str, dense: float | None, colours: Mapping[str, int], title: str
) -> str:
    """An SVG of the rows of one kind of space, or nothing where none was measured.

    Args:
        rows: of `launch.sweeping.tables.collect_rows`.
        stage: `before` or `recovered`.
        dense: perplexity of the control, drawn as a dashed line.
        colours: by method: the number of its colour; one without has that of random channels.
        title: for readers that do not see it.
    """
    rows = [row for row in rows if _is_drawn(row, stage)]
    if not rows:
        return ""
    lines = {m: _line(m, rows, stage, colours) for m in dict.fromkeys(r["method"] for r in rows)}
    x, y = _axes(rows, stage, dense, lines)
    parts = [*axis_y(y, "perplexity", x.end), *axis_x(x, "state removed, %")]
    parts += [_band(line, _of(rows, method), stage, x, y) for method, line in lines.items()]
    labelled = list(lines.values())
    if dense is not None:
        control = Line("dense", "dense", (x.low, x.high), (dense, dense), colour=INK)
        parts.append(
            f'<path {looks(control, "dashed")} d="M{x.start:g} {y(dense):.1f}H{x.end:g}"/>'
        )
        labelled.append(control)
    parts += [_drawn(line, x, y) for line in lines.values()]
    return svg(WIDTH, HEIGHT, title, [*parts, *end_labels(labelled, x, y)])


def log_ticks(low: float, high: float) -> tuple[float, ...]:
    """Round numbers from `low` to `high`, about evenly spread over a logarithmic axis."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for mantissas in MANTISSAS:
        marks = [m * 10.0**power for power in decades for m in mantissas]
        inside = tuple(mark for mark in marks if low <= mark <= high)
        if len(inside) >= FEWEST_TICKS:
            return inside
    return tuple(round_numbers(low, high))


def removed(row: Row) -> float | None:
    """The part of the state that a row's models are without, in percent."""
    part = row.get("removed")
    return None if part is None else 100 * part


def _is_drawn(row: Row, stage: str) -> bool:
    value = row.get(stage)
    return removed(row) is not None and value is not None and math.isfinite(value)


def _of(rows: Sequence[Row], method: str) -> list[Row]:
    return sorted((r for r in rows if r["method"] == method), key=lambda r: r["removed"])


def _line(method: str, rows: Sequence[Row], stage: str, colours: Mapping[str, int]) -> Line:
    own = _of(rows, method)
    number = colours.get(method)
    colour = "" if number is None else f"var(--s{number % COLOURS})"
    x = [100 * row["removed"] for row in own]
    return Line("random", method, x, [row[stage] for row in own], colour=colour)


def _axes(
    rows: Sequence[Row], stage: str, dense: float | None, lines: Mapping[str, Line]
) -> tuple[MarkedAxis, MarkedAxis]:
    values = [bound for row in rows for bound in _bounds(row, stage)]
    values += [] if dense is None else [dense]
    low, high = _widened(min(values), max(values))
    right = max(24.0, 12 + LABEL_WIDTH * max(len(name) for name in [*lines, "dense"]))
    counts = Counter(round(100 * row["removed"], 1) for row in rows)
    low_x, high_x = min(counts), max(counts)
    first, last = (low_x, high_x) if len(counts) > 1 else (low_x - 5, low_x + 5)
    gap = NUMBER_WIDTH * (last - first) / (WIDTH - right - LEFT)
    return (
        MarkedAxis(first, last, LEFT, WIDTH - right, marks=_apart(counts, gap)),
        MarkedAxis(low, high, HEIGHT - BOTTOM, TOP, marks=log_ticks(low, high), logarithmic=True),
    )


def _apart(counts: Mapping[float, int], gap: float) -> tuple[float, ...]:
    """Places of points that lie more than `gap` apart, those of many points before others."""
    found: list[float] = []
    for x in sorted(counts, key=lambda x: (-counts[x], x)):
        if all(abs(x - other) > gap for other in found):
            found.append(x)
    return tuple(sorted(found))


def _widened(low: float, high: float) -> tuple[float, float]:
    factor = max(high / low, 1.02) ** MARGIN
    return low / factor, high * factor


def _bounds(row: Row, stage: str) -> tuple[float, float]:
    value, spread = row[stage], row.get(f"{stage}_spread") or 0.0
    # A deviation as large as the mean would leave a logarithmic axis.
    return max(value - spread, value / 2), value + spread


def _band(line: Line, rows: Sequence[Row], stage: str, x: Axis, y: Axis) -> str:
    if not any(row.get(f"{stage}_spread") for row in rows):
        return ""
    bounds = [_bounds(row, stage) for row in rows]
    if len(rows) == 1:
        (low, high), middle = bounds[0], x(line.x[0])
        edge = f"M{middle - 4:.1f} {y(low):.1f}h8V{y(high):.1f}h-8z"
        return f'<path {looks(line, "band")} d="{edge}"/>'
    upper = [f"{x(px):.1f} {y(b[1]):.1f}" for px, b in zip(line.x, bounds, strict=True)]
    lower = [f"{x(px):.1f} {y(b[0]):.1f}" for px, b in zip(line.x, bounds, strict=True)]
    return f'<path {looks(line, "band")} d="M{"L".join([*upper, *lower[::-1]])}z"/>'


def _drawn(line: Line, x: Axis, y: Axis) -> str:
    places = [(x(px), y(py)) for px, py in zip(line.x, line.y, strict=True)]
    path = "L".join(f"{px:.1f} {py:.1f}" for px, py in places)
    dots = "".join(
        f'<circle {looks(line, "dot")} cx="{px:.1f}" cy="{py:.1f}" r="2.6"/>' for px, py in places
    )
    stroke = f'<path {looks(line, "line")} d="M{path}"/>' if len(places) > 1 else ""
    return stroke + dots
