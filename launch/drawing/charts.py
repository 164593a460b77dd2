"""Line charts as inline SVG, coloured by the page's own style.

A chart is drawn 400 pixels wide and scaled by the page, so that text stays readable on a phone.
Marks carry the class `m-NAME` of their model; the page gives each class its colour, in a dark
scheme another one, so that a model has one colour everywhere.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 400, 250
LEFT, TOP, BOTTOM = 54, 12, 40
LABEL_GAP = 14.0
"""Least distance of two labels at the ends of lines, in pixels."""

LABEL_WIDTH = 7.0
"""About the width of a letter of a label, in pixels."""


@dataclass(frozen=True)
class Line:
    """One line of a chart: its class, the label at its end, and its points in order of x."""

    name: str
    label: str
    x: Sequence[float]
    y: Sequence[float]
    faint: Sequence[float] | None = None
    """Unsmoothed y, drawn behind the line."""
    colour: str = ""
    """A CSS colour instead of that of the page's class."""

    def finite(self, values: Sequence[float]) -> list[tuple[float, float]]:
        pairs = zip(self.x, values, strict=True)
        return [(x, y) for x, y in pairs if math.isfinite(x) and math.isfinite(y)]


@dataclass(frozen=True)
class Axis:
    """Maps values from `low` to `high` onto pixels from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (self._flat(v) for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        if self.log:
            first, last = math.ceil(self._flat(self.low)), math.floor(self._flat(self.high))
            every = max(1, (last - first) // 4)
            return [10.0**power for power in range(last, first - 1, -every)]
        return round_numbers(self.low, self.high)

    def _flat(self, value: float) -> float:
        return math.log10(max(value, 1e-300)) if self.log else value


def line_chart(
    lines: Sequence[Line],
    x_label: str,
    y_label: str,
    title: str,
    log_y: bool = False,
    log_x: bool = False,
    y_extent: tuple[float, float] | None = None,
) -> str:
    """An SVG of `lines`, each labelled at its end, or a sentence where there is nothing to draw.

    Args:
        x_label, y_label: what the axes show, with units.
        title: what the chart shows, for readers that do not see it.
        log_y, log_x: a logarithmic axis; its values must be positive.
        y_extent: ends of the y axis; by default those of the values.
    """
    lines = [line for line in lines if len(line.finite(line.y)) > 1]
    if not lines:
        return '<p class="note">Fewer than two points were recorded.</p>'
    right = max(24.0, 12 + LABEL_WIDTH * max(len(line.label) for line in lines))
    x = Axis(*_extent(lines, "x"), LEFT, WIDTH - right, log_x)
    y = Axis(
        *(y_extent or (_log_extent(lines) if log_y else padded(_extent(lines, "y")))),
        HEIGHT - BOTTOM,
        TOP,
        log_y,
    )
    parts = [*axis_y(y, y_label, x.end), *axis_x(x, x_label)]
    parts += [_path(line.finite(line.faint), x, y, line, "faint") for line in lines if line.faint]
    parts += [_path(line.finite(line.y), x, y, line, "line") for line in lines]
    parts += end_labels(lines, x, y)
    return svg(WIDTH, HEIGHT, title, parts)


def svg(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    """An `<svg>` that scales with its column."""
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(title)}">'
        + "".join(parts)
        + "</svg>"
    )


def round_numbers(low: float, high: float, about: int = 5) -> list[float]:
    """Some `about` round numbers from `low` to `high`."""
    if not high > low:
        return [low]
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def spread(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """`positions` moved as little as needed to be `gap` apart and, where they fit, inside."""
    order = sorted(range(len(positions)), key=lambda index: positions[index])
    moved = list(positions)
    for before, after in zip(order, order[1:], strict=False):
        moved[after] = max(moved[after], moved[before] + gap)
    if order and moved[order[-1]] > high:
        moved[order[-1]] = high
        for after, before in zip(order[::-1], order[-2::-1], strict=False):
            moved[before] = min(moved[before], moved[after] - gap)
    return [max(position, low) for position in moved]


def _extent(lines: Sequence[Line], axis: str) -> tuple[float, float]:
    which = 0 if axis == "x" else 1
    values = [point[which] for line in lines for point in line.finite(line.y)]
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def padded(extent: tuple[float, float]) -> tuple[float, float]:
    """The extent with a margin on both sides."""
    low, high = extent
    margin = 0.06 * (high - low)
    return low - margin, high + margin


def _log_extent(lines: Sequence[Line]) -> tuple[float, float]:
    """The values' extent down to their smallest power of ten."""
    values = [y for line in lines for _, y in line.finite(line.y) if y > 0] or [1.0]
    low = 10.0 ** math.floor(math.log10(min(values)))
    return low, max(max(values), low * 10)


def axis_x(axis: Axis, label: str, base: float = HEIGHT - BOTTOM) -> list[str]:
    """An x axis at height `base` with its ticks and its label."""
    ticks = "".join(
        f'<text x="{axis(value):.1f}" y="{base + 16}" class="middle">{_number(value)}</text>'
        for value in axis.ticks()
    )
    middle = (axis.start + axis.end) / 2
    return [
        f'<path class="axis" d="M{axis.start} {base}H{axis.end:.1f}"/>',
        ticks,
        f'<text x="{middle:.1f}" y="{base + BOTTOM - 6:g}" class="middle label">'
        f"{escape(label)}</text>",
    ]


def axis_y(axis: Axis, label: str, right: float, whole: bool = False) -> list[str]:
    """A y axis with rules up to `right` and its label; `whole` leaves out broken numbers."""
    parts = []
    for value in axis.ticks():
        if whole and value % 1:
            continue
        y = axis(value)
        text = _power(value) if axis.log else _number(value)
        parts.append(f'<path class="rule" d="M{LEFT} {y:.1f}H{right:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" class="end">{text}</text>')
    middle = (axis.start + axis.end) / 2
    turned = f'transform="rotate(-90 11 {middle:.0f})"'
    parts.append(
        f'<text x="11" y="{middle:.0f}" class="middle label" {turned}>{escape(label)}</text>'
    )
    return parts


def _path(points: list[tuple[float, float]], x: Axis, y: Axis, line: Line, kind: str) -> str:
    """A polyline inside the axes' frame; values outside are drawn at its edge."""
    if len(points) < 2:
        return ""
    low, high = sorted((y.start, y.end))
    drawn = [f"{x(px):.1f} {min(max(y(py), low), high):.1f}" for px, py in thinned(points)]
    return f'<path {looks(line, kind)} d="M{"L".join(drawn)}"/>'


def looks(line: Line, kind: str) -> str:
    """The attributes that colour a mark of `line`."""
    colour = f' style="--c:{escape(line.colour)}"' if line.colour else ""
    return f'class="{kind} m-{escape(line.name)}"{colour}'


def thinned(points: list[tuple[float, float]], most: int = 400) -> list[tuple[float, float]]:
    """At most about `most` of `points`, evenly chosen, the last one among them."""
    every = math.ceil(len(points) / most)
    return points[::every] + ([points[-1]] if (len(points) - 1) % every else [])


def end_labels(lines: Sequence[Line], x: Axis, y: Axis) -> list[str]:
    """The name of each line behind its last point, moved apart where they would overlap."""
    lines = [line for line in lines if line.label]
    ends = [line.finite(line.y)[-1] for line in lines]
    wanted = [y(point[1]) for point in ends]
    placed = spread(wanted, LABEL_GAP, TOP + 4, HEIGHT - BOTTOM - 2)
    parts = []
    for line, (end_x, _), want, place in zip(lines, ends, wanted, placed, strict=True):
        start = x(end_x)
        if abs(want - place) > 3:
            parts.append(
                f"<path {looks(line, 'leader')} "
                f'd="M{start + 2:.1f} {want:.1f}L{start + 8:.1f} {place:.1f}"/>'
            )
        parts.append(
            f'<text {looks(line, "name")} x="{start + 10:.1f}" y="{place + 4:.1f}">'
            f"{escape(line.label)}</text>"
        )
    return parts


def _number(value: float) -> str:
    if abs(value) >= 10_000:
        return f"{value / 1000:,.6g}k"
    return f"{value:,.6g}"


def _power(value: float) -> str:
    power = round(math.log10(value))
    if power == 0:
        return "1"
    return f'10<tspan dy="-4" font-size="9">{power if power > 0 else f"−{-power}"}</tspan>'
