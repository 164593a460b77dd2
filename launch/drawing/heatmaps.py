"""Heat maps, histograms, pairs and scatters: the marks of a rank analysis, and SVG files of them.

They share the classes of `launch.drawing.charts`, so a page's own style colours them; `svg_file`
gives one that stands alone the same style.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from html import escape

from launch.drawing.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    TOP,
    WIDTH,
    Axis,
    axis_x,
    axis_y,
    padded,
    svg,
)

RAMP = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
"""From low to high, even in lightness, read in grey and by the colour-blind."""

NOTHING = '<p class="note">No value is finite.</p>'
"""What a mark without a finite value reads; all values that are given must be finite."""

NUMBERED_CELLS = 20.0
"""Narrowest cell, in pixels, that has its number written in it."""

TITLE_LETTER = 7.9
"""About the width of a letter of a title, in pixels."""

STYLE = """
svg.figure { --page: #fff; --ink: #1b1f24; --soft: #59636e; --rule: #e3e6ea; --dense: #0072b2;
  --pruned: #c8500a; --other: #8a5fa8; --low: #0072b2; --high: #c8500a;
  font-family: system-ui, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; }
@media (prefers-color-scheme: dark) { svg.figure { --page: #14171b; --ink: #e8eaed;
  --soft: #a0a8b2; --rule: #2c3239; --dense: #4aa8e0; --pruned: #f08a4b; --other: #b795d0;
  --low: #4aa8e0; --high: #f08a4b; } }
.figure .page { fill: var(--page); }
.figure text { fill: var(--soft); font-size: 11.5px; }
.figure text.title { fill: var(--ink); font-size: 14px; font-weight: 650; }
.figure .middle { text-anchor: middle; } .figure .end { text-anchor: end; }
.figure text.name { fill: var(--c); font-weight: 600; paint-order: stroke; stroke: var(--page);
  stroke-width: 4px; }
.figure .axis { stroke: var(--soft); fill: none; }
.figure .rule { stroke: var(--rule); fill: none; }
.figure .line { stroke: var(--c); stroke-width: 2; fill: none; stroke-linejoin: round;
  stroke-linecap: round; }
.figure .leader { stroke: var(--c); fill: none; opacity: .6; }
.figure [class*="m-"] { --c: var(--other); }
.figure .m-dense { --c: var(--dense); } .figure .m-pruned { --c: var(--pruned); }
"""

LOW, HIGH = "var(--low, #2f86c1)", "var(--high, #d4672a)"
"""Colours of the groups of low and of high rank."""


def svg_file(drawing: str, title: str) -> str:
    """An SVG of `launch.drawing.charts` as a file of its own: style, background and title in it."""
    start = drawing.index('viewBox="') + len('viewBox="')
    width, height = map(float, drawing[start : drawing.index('"', start)].split()[2:])
    lines = textwrap.wrap(title, int(width / TITLE_LETTER))
    top = 18 * len(lines) + 20
    size = (width + 24, height + top + 12)
    box = f"-12 {-top} {size[0]:g} {size[1]:g}"
    head, _, body = drawing.partition(">")
    label = head[head.index("role=") :]
    heading = "".join(
        f'<text class="title" x="0" y="{18 * (number + 1) - top + 6}">{escape(line)}</text>'
        for number, line in enumerate(lines)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="figure" viewBox="{box}" '
        f'width="{2 * size[0]:g}" height="{2 * size[1]:g}" {label}><style>{STYLE}</style>'
        f'<rect class="page" x="-12" y="{-top}" width="{size[0]:g}" height="{size[1]:g}"/>'
        f"{heading}{body}"
    )


def heat_map(
    rows: Mapping[str, Sequence[float]],
    labels: tuple[str, str],
    title: str,
    extent: tuple[float, float] | None = None,
) -> str:
    """An SVG with a row for each entry of `rows` and a column for each of its values.

    Args:
        labels: what rows and columns are.
        extent: the values at the two ends of the colours; by default the smallest and the largest.
            A value that is not finite has no colour.
    """
    low, high = extent or extent_of(rows)
    columns = max(map(len, rows.values()))
    width = (WIDTH - LEFT - 8) / columns
    height = min(30.0, max(7.0, 420 / len(rows)))
    numbered = width >= NUMBERED_CELLS and height >= 14
    every = math.ceil(12 / height)
    parts = []
    for number, (label, row) in enumerate(rows.items()):
        y = number * height
        if number % every == 0:
            middle = y + height / 2 + 4
            parts.append(
                f'<text x="{LEFT - 6}" y="{middle:.1f}" class="end">{escape(label)}</text>'
            )
        for column, value in enumerate(row):
            cell = (LEFT + column * width, y, width, height)
            parts.append(_cell(cell, value, _share(value, low, high), numbered))
    base = len(rows) * height
    parts.append(row_label(labels[0], base / 2))
    parts += _column_numbers(columns, width, base, labels[1])
    parts += _legend(base + 22, low, high)
    return svg(WIDTH, base + 40, title, parts)


def extent_of(rows: Mapping[str, Sequence[float]]) -> tuple[float, float]:
    """The smallest and the largest finite value of `rows`."""
    values = [value for row in rows.values() for value in row if math.isfinite(value)]
    return (min(values), max(values)) if values else (0.0, 1.0)


def row_label(text: str, middle: float) -> str:
    """A turned label left of the rows, around the height `middle`."""
    turned = f'transform="rotate(-90 14 {middle:.0f})"'
    return f'<text x="14" y="{middle:.0f}" class="middle label" {turned}>{escape(text)}</text>'


def histogram(
    values: Sequence[float], bound: float, x_label: str, title: str, unit: str = "heads"
) -> str:
    """An SVG of how often values occur; those above `bound` in another colour.

    A dashed line marks the bound unless it is NaN. No bin has values of both sides.
    """
    if not values:
        return NOTHING
    low, high = min(values), max(values)
    edges = _edges(low, high, len(values), bound)
    counts = [0] * (len(edges) - 1)
    for value in values:
        counts[_bin(edges, value)] += 1
    x = Axis(edges[0], edges[-1], LEFT, WIDTH - 16)
    y = Axis(0, max(counts) * 1.08, HEIGHT - BOTTOM, TOP)
    parts = [*axis_y(y, unit, x.end, whole=True), *axis_x(x, x_label)]
    for left, right, count in zip(edges, edges[1:], counts, strict=False):
        colour = HIGH if (left + right) / 2 > bound else LOW
        top, gap = y(count), 0.8
        if count:
            parts.append(
                f'<rect x="{x(left) + gap:.1f}" y="{top:.1f}" height="{y.start - top:.1f}" '
                f'width="{max(x(right) - x(left) - 2 * gap, 1):.1f}" style="fill:{colour}"/>'
            )
    if math.isfinite(bound):
        parts.append(
            f'<path class="axis" stroke-dasharray="4 3" d="M{x(bound):.1f} {TOP}V{y.start}"/>'
        )
    return svg(WIDTH, HEIGHT, title, parts)


def pairs(
    rows: Mapping[str, tuple[float, float]],
    names: tuple[str, str],
    labels: tuple[str, str],
    title: str,
) -> str:
    """An SVG with a row for each entry: two dots, joined, on one axis that starts at 0.

    Args:
        rows: the two values by label.
        names: what the first (class `m-dense`) and the second (`m-pruned`) value are of.
        labels: what rows and values are.
    """
    if not rows:
        return NOTHING
    x = Axis(0, max(max(pair) for pair in rows.values()) * 1.06 or 1.0, LEFT, WIDTH - 16)
    step = min(26.0, max(11.0, 300 / len(rows)))
    top = 26
    base = top + len(rows) * step
    parts = []
    for value in x.ticks():
        parts.append(f'<path class="rule" d="M{x(value):.1f} {top - 4}V{base:.1f}"/>')
    for number, (label, (first, second)) in enumerate(rows.items()):
        y = top + (number + 0.5) * step
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" class="end">{escape(label)}</text>')
        parts.append(f'<path class="axis" d="M{x(first):.1f} {y:.1f}H{x(second):.1f}"/>')
        for name, value in (("dense", first), ("pruned", second)):
            parts.append(
                f'<circle class="m-{name}" cx="{x(value):.1f}" cy="{y:.1f}" r="4" '
                'style="fill:var(--c)"/>'
            )
    parts += _key(names)
    parts += [*axis_x(x, labels[1], base), row_label(labels[0], (top + base) / 2)]
    return svg(WIDTH, base + BOTTOM, title, parts)


def scatter(
    points: Sequence[tuple[float, float]],
    labels: tuple[str, str],
    title: str,
    high: Sequence[bool] | None = None,
) -> str:
    """An SVG of points over one scale for both axes, with the diagonal.

    Args:
        labels: what x and y are.
        high: which points are of the group of high rank.
    """
    if not points:
        return NOTHING
    extent = padded(_extent([value for point in points for value in point]))
    side = HEIGHT - BOTTOM - TOP
    left = (WIDTH - LEFT - side) / 2
    x = Axis(*extent, LEFT, LEFT + side)
    y = Axis(*extent, HEIGHT - BOTTOM, TOP)
    parts = [*axis_y(y, labels[1], x.end), *axis_x(x, labels[0])]
    parts.append(
        f'<path class="axis" stroke-dasharray="4 3" d="M{x.start} {y.start}L{x.end} {y.end}"/>'
    )
    for (a, b), is_high in zip(points, high or [False] * len(points), strict=True):
        parts.append(
            f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="3.5" '
            f'style="fill:{HIGH if is_high else LOW};fill-opacity:.75"/>'
        )
    return svg(WIDTH, HEIGHT, title, [f'<g transform="translate({left:g} 0)">', *parts, "</g>"])


def _cell(cell: tuple[float, float, float, float], value: float, share: float, text: bool) -> str:
    if not math.isfinite(value):
        return ""
    x, y, width, height = cell
    red, green, blue = _colour(share)
    gap = 1.0 if min(width, height) > 8 else 0.0
    drawn = (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width - gap:.1f}" height="{height - gap:.1f}" '
        f'fill="rgb({red},{green},{blue})"/>'
    )
    if not text:
        return drawn
    ink = "#1b1f24" if 0.3 * red + 0.59 * green + 0.11 * blue > 130 else "#fff"
    place = f'x="{x + width / 2:.1f}" y="{y + height / 2 + 3.5:.1f}"'
    size = min(11.0, width / 2.7)
    style = f"fill:{ink};font-size:{size:.1f}px"
    number = number_text(value, tight=width < 28)
    return f'{drawn}<text {place} class="middle" style="{style}">{number}</text>'


def number_text(value: float, tight: bool = False) -> str:
    """Two or three digits; where it is tight, two and no leading zero."""
    if tight and 0 < value < 0.995:
        return f"{value:.2f}"[1:]
    if tight and abs(value) < 9.95:
        return f"{value:.1f}"
    if value != 0 and (abs(value) < 0.01 or abs(value) >= 1000):
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.0f}"


def _colour(share: float) -> tuple[int, int, int]:
    place = min(max(share, 0.0), 1.0) * (len(RAMP) - 1)
    index = min(int(place), len(RAMP) - 2)
    pairs_ = zip(RAMP[index], RAMP[index + 1], strict=True)
    red, green, blue = (round(a + (place - index) * (b - a)) for a, b in pairs_)
    return red, green, blue


def _share(value: float, low: float, high: float) -> float:
    return (value - low) / (high - low) if high > low else 0.5


def _column_numbers(columns: int, width: float, base: float, name: str) -> list[str]:
    every = math.ceil(24 / width)
    numbers = [
        f'<text x="{LEFT + (column + 0.5) * width:.1f}" y="{base + 14:.1f}" class="middle">'
        f"{column}</text>"
        for column in range(0, columns, every)
    ]
    label = f'<text x="{LEFT}" y="{base + 32:.1f}" class="label">{escape(name)}</text>'
    return [*numbers, label]


def _legend(top: float, low: float, high: float) -> list[str]:
    """The ramp with its two ends."""
    width, steps = 120.0, 40
    left = WIDTH - 8 - 44 - width
    parts = []
    for step in range(steps):
        red, green, blue = _colour((step + 0.5) / steps)
        parts.append(
            f'<rect x="{left + step * width / steps:.1f}" y="{top:.1f}" height="10" '
            f'width="{width / steps + 0.3:.1f}" fill="rgb({red},{green},{blue})"/>'
        )
    ends = (("end", left - 6, low), ("", left + width + 6, high))
    return parts + [
        f'<text class="{kind}" x="{x:.1f}" y="{top + 9:.1f}">{number_text(value)}</text>'
        for kind, x, value in ends
    ]


def _key(names: tuple[str, str]) -> list[str]:
    parts, x = [], float(LEFT)
    for kind, name in zip(("dense", "pruned"), names, strict=True):
        parts.append(
            f'<circle class="m-{kind}" cx="{x + 4:.1f}" cy="8" r="4" style="fill:var(--c)"/>'
            f'<text class="name m-{kind}" x="{x + 12:.1f}" y="12">{escape(name)}</text>'
        )
        x += 30 + 7.0 * len(name)
    return parts


def _edges(low: float, high: float, count: int, bound: float) -> list[float]:
    """Bins of one width over all values, shifted so that the bound is an edge."""
    if high <= low:
        return [low - 0.5, low + 0.5]
    bins = min(24, max(6, round(2 * math.sqrt(count))))
    width = (high - low) / bins
    start = low if math.isnan(bound) else bound - math.ceil((bound - low) / width) * width
    return [start + index * width for index in range(math.floor((high - start) / width) + 2)]


def _bin(edges: Sequence[float], value: float) -> int:
    """Which bin holds `value`: an edge belongs to the bin below it, as a bound does."""
    inside = [index for index, edge in enumerate(edges[1:-1], 1) if value > edge]
    return inside[-1] if inside else 0


def _extent(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)
