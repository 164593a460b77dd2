"""Line charts, each line labelled at its end."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from launch.drawing.figure import BOTTOM, TOP, axes, colour, number, picture, set_ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LABEL_GAP = 14.0
"""Least distance of two labels at the ends of lines, in points."""

LETTER = 7.9
"""Approximate width of a letter of a label, in points."""

MOST_LETTERS = 24
"""Most letters of a label that are shown."""

MOST_POINTS = 400
"""Points above which only every n-th point of a line is drawn."""

SHADES = ("#2f86c1", "#9a6fb0", "#d4672a")
"""Colours of things in order, first to last; they differ on light and on dark pages."""


@dataclass(frozen=True)
class Line:
    """One line of a chart."""

    role: str
    """Its colour, by the roles of `launch.drawing.figure`."""
    label: str
    """What stands at its end; empty for nothing."""
    x: Sequence[float]
    y: Sequence[float]
    faint: Sequence[float] | None = None
    """Unsmoothed y, drawn behind the line."""
    shade: float | None = None
    """A place from 0 to 1 on the scale `SHADES`, instead of the role's colour."""

    @property
    def colour(self) -> Any:
        """The colour for matplotlib."""
        if self.shade is None:
            return colour(self.role)
        from matplotlib.colors import LinearSegmentedColormap

        return LinearSegmentedColormap.from_list("shades", SHADES)(self.shade)

    def points(self, values: Sequence[float] | None = None) -> list[tuple[float, float]]:
        """Return the finite points, thinned to about `MOST_POINTS`; y is `values` if given."""
        pairs = zip(self.x, self.y if values is None else values, strict=True)
        found = [(x, y) for x, y in pairs if math.isfinite(x) and math.isfinite(y)]
        every = math.ceil(len(found) / MOST_POINTS) or 1
        return found[::every] + ([found[-1]] if (len(found) - 1) % every else [])


def line_chart(
    lines: Sequence[Line],
    x_label: str,
    y_label: str,
    title: str,
    log_y: bool = False,
    log_x: bool = False,
    y_extent: tuple[float, float] | None = None,
) -> str:
    """Return an SVG of the lines that have two points; an empty string if none has.

    Args:
        lines: what to draw.
        x_label, y_label: what the axes show, with units; x is a whole number.
        title: what the chart shows, for readers that do not see it.
        log_y, log_x: a logarithmic axis; its values must be positive.
        y_extent: ends of the y axis; by default those of the values.
    """
    lines = [line for line in lines if len(line.points()) > 1]
    if not lines:
        return ""

    def paint(figure: Any) -> None:
        ax = axes(figure, right=room_for_labels(line.label for line in lines))
        for line in lines:
            if line.faint:
                faint = zip(*line.points(line.faint), strict=True)
                ax.plot(*faint, color=line.colour, lw=1, alpha=0.3)
            ax.plot(*zip(*line.points(), strict=True), color=line.colour, lw=2)
        ax.set(xlabel=x_label, ylabel=y_label)
        _set_x(ax, lines, log_x)
        _set_y(ax, lines, log_y, y_extent)
        end_labels(ax, lines)

    return picture(title, paint)


def room_for_labels(labels: Iterable[str]) -> float:
    """Return the points to leave free at the right for `labels`, which must not be empty."""
    return max(24.0, 14 + LETTER * max(len(shortened(label)) for label in labels))


def shortened(label: str) -> str:
    """Return `label`, cut to `MOST_LETTERS` with an ellipsis at the end if it is longer."""
    return label if len(label) <= MOST_LETTERS else f"{label[: MOST_LETTERS - 1]}…"


def end_labels(ax: "Axes", lines: Sequence[Line]) -> None:
    """Write the label of each line behind its last point, moved apart where they would overlap."""
    named = [line for line in lines if line.label]
    ends = [line.points()[-1] for line in named]
    low, high = ax.get_ylim()
    wanted = [ax.transData.transform((x, min(max(y, low), high))) for x, y in ends]
    top = ax.bbox.ymax
    placed = spread([float(y) for _, y in wanted], LABEL_GAP, BOTTOM + 4, top + TOP - 14)
    for line, (x, y), place in zip(named, wanted, placed, strict=True):
        leader = {"arrowstyle": "-", "color": line.colour, "alpha": 0.6, "shrinkA": 0, "shrinkB": 2}
        ax.annotate(
            shortened(line.label),
            (x, y),
            (x + 10, place),
            xycoords="figure pixels",
            textcoords="figure pixels",
            color=line.colour,
            fontweight=700,
            va="center",
            arrowprops=leader if abs(place - y) > 3 else None,
            annotation_clip=False,
        )


def spread(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Return `positions` moved to be `gap` apart and, if they fit, from `low` to `high`."""
    order = sorted(range(len(positions)), key=lambda index: positions[index])
    moved = list(positions)
    for before, after in zip(order, order[1:], strict=False):
        moved[after] = max(moved[after], moved[before] + gap)
    if order and moved[order[-1]] > high:
        moved[order[-1]] = high
        for after, before in zip(order[::-1], order[-2::-1], strict=False):
            moved[before] = min(moved[before], moved[after] - gap)
    return [max(position, low) for position in moved]


def _set_x(ax: "Axes", lines: Sequence[Line], log: bool) -> None:
    from matplotlib.ticker import MaxNLocator

    values = [x for line in lines for x, _ in line.points()]
    ax.set_xlim(*_widened(min(values), max(values)))
    if log:
        ax.set_xscale("log")
        set_ticks(ax.xaxis, _powers(*ax.get_xlim()))
    else:
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        ax.xaxis.set_major_formatter(lambda value, _: number(value))


def _set_y(
    ax: "Axes", lines: Sequence[Line], log: bool, extent: tuple[float, float] | None
) -> None:
    values = [y for line in lines for _, y in line.points()]
    if log:
        bottom = 10.0 ** math.floor(math.log10(min((y for y in values if y > 0), default=1.0)))
        ax.set_yscale("log")
        ax.set_ylim(*(extent or (bottom, max(*values, 10 * bottom))))
        set_ticks(ax.yaxis, _powers(*ax.get_ylim()))
    else:
        low, high = _widened(min(values), max(values))
        margin = 0.06 * (high - low)
        ax.set_ylim(*(extent or (low - margin, high + margin)))
        ax.yaxis.set_major_formatter(lambda value, _: number(value))


def _powers(low: float, high: float) -> list[float]:
    """Return some powers of ten from `low` to `high`, with the largest among them."""
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    every = max(1, (last - first) // 4)
    return [10.0**power for power in range(last, first - 1, -every)]


def _widened(low: float, high: float) -> tuple[float, float]:
    return (low, high) if high > low else (low - 0.5, high + 0.5)
