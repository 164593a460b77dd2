"""Grids: a heat map with a row and a column for each value, and the kept channels of heads."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from launch.drawing.figure import BOTTOM, LEFT, WIDTH, axes, colour, picture

NUMBERED_WIDTH, NUMBERED_HEIGHT = 20.0, 14.0
"""Smallest cell, in points, that has its number written in it."""

LEGEND_CELLS = 40


def heat_map(
    rows: Mapping[str, Sequence[float]],
    labels: tuple[str, str],
    title: str,
    extent: tuple[float, float] | None = None,
) -> str:
    """An SVG with a row for each entry of `rows` and a column for each of its values.

    Args:
        rows: values by the label of their row; one that is not finite has no colour.
        labels: what rows and columns are.
        title: what the picture shows, for readers that do not see it.
        extent: the values at the two ends of the colours; by default the smallest and the largest.
    """
    low, high = extent or extent_of(rows)
    columns = max(map(len, rows.values()))
    cell = (WIDTH - LEFT - 8) / columns
    row = min(30.0, max(7.0, 420 / len(rows)))
    numbered = cell >= NUMBERED_WIDTH and row >= NUMBERED_HEIGHT

    def paint(figure: Any) -> None:
        import numpy as np

        values = np.full((len(rows), columns), np.nan)
        for place, row_values in enumerate(rows.values()):
            values[place, : len(row_values)] = row_values
        ax = axes(figure, right=8, bottom=BOTTOM + 4, top=4)
        mesh = ax.pcolormesh(
            np.ma.masked_invalid(values), cmap="viridis", vmin=low, vmax=high,
            edgecolor=colour("page"), linewidth=0.8 if min(cell, row) > 8 else 0,
        )  # fmt: skip
        _set_grid(ax, list(rows), columns, row, cell, labels)
        if numbered:
            _write_numbers(ax, mesh, values, cell)
        _legend(figure, low, high)

    return picture(title, paint, len(rows) * row + BOTTOM + 8)


def extent_of(rows: Mapping[str, Sequence[float]]) -> tuple[float, float]:
    """The smallest and the largest finite value of `rows`."""
    values = [value for row in rows.values() for value in row if math.isfinite(value)]
    return (min(values), max(values)) if values else (0.0, 1.0)


def channel_grid(kept: Sequence[Sequence[int]], head_dim: int, title: str) -> str:
    """An SVG with a row a head and a column a channel; kept channels are filled.

    Args:
        kept: channels kept in each head, in increasing order.
        head_dim: channels a head had before.
        title: what the picture shows, for readers that do not see it.
    """
    heads = range(len(kept))
    row = min(22.0, max(3.0, 160 / max(len(kept), 1)))
    cell = (WIDTH - LEFT - 8) / head_dim
    stretches = [(head, *run) for head in heads for run in runs(kept[head])]

    def paint(figure: Any) -> None:
        ax = axes(figure, right=8, bottom=BOTTOM, top=4)
        gap = 0.06 if row > 4 else 0.0
        for role, boxes in (("gone", [(h, 0, head_dim) for h in heads]), ("pruned", stretches)):
            ax.add_patch(_boxes(boxes, gap, facecolor=colour(role), linewidth=0))
        if cell >= 4:
            x = [place for c in range(1, head_dim) for place in (c, c, math.nan)]
            ax.plot(x, [0, len(kept), 0] * (head_dim - 1), color=colour("page"), lw=0.8)
        _set_grid(ax, list(map(str, heads)), head_dim, row, cell, ("head", "channel"))

    return picture(title, paint, max(len(kept), 1) * row + BOTTOM + 4)


def runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Consecutive stretches of increasing `numbers` as (first, count)."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and number == sum(found[-1]):
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((number, 1))
    return found


def number_text(value: float, tight: bool = False) -> str:
    """Two or three digits; where it is tight, two and no leading zero."""
    if tight and 0 < value < 0.995:
        return f"{value:.2f}"[1:]
    if tight and abs(value) < 9.95:
        return f"{value:.1f}"
    if value != 0 and (abs(value) < 0.01 or abs(value) >= 1000):
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.0f}"


def _set_grid(
    ax: Any, names: Sequence[str], columns: int, row: float, cell: float, labels: tuple[str, str]
) -> None:
    """Name every row and column that has room for its name; the first row is at the top."""
    every_row = math.ceil(12 / row)
    every_column = next(n for n in (1, 2, 4, 8, 16, 32, 64, columns) if n * cell >= 24)
    ax.set(xlim=(0, columns), ylim=(len(names), 0), ylabel=labels[0])
    # At the left, since the colours of a heat map stand below the columns at the right.
    ax.set_xlabel(labels[1], loc="left")
    shown = range(0, len(names), every_row)
    ax.set_yticks([place + 0.5 for place in shown], [names[place] for place in shown])
    numbers = range(0, columns, every_column)
    ax.set_xticks([place + 0.5 for place in numbers], [str(place) for place in numbers])
    ax.grid(False)
    ax.spines["bottom"].set_visible(False)


def _boxes(boxes: Sequence[tuple[int, int, int]], gap: float, **look: Any) -> Any:
    """One artist of boxes (row, first column, columns) that leave `gap` above and below."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    corners = [
        [(x, y + gap), (x + n, y + gap), (x + n, y + 1 - gap), (x, y + 1 - gap)]
        for y, x, n in boxes
    ]
    paths = [Path([*corner, corner[0]], closed=True) for corner in corners]
    return PathPatch(Path.make_compound_path(*paths), **look)


def _write_numbers(ax: Any, mesh: Any, values: Any, cell: float) -> None:
    import numpy as np

    for row, column in np.argwhere(np.isfinite(values)):
        value = float(values[row, column])
        red, green, blue, _ = mesh.to_rgba(value)
        ink = "#1b1f24" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.51 else "#fff"
        text, size = number_text(value, tight=cell < 28), min(11.0, cell / 2.7)
        ax.text(column + 0.5, row + 0.5, text, ha="center", va="center", color=ink, size=size)


def _legend(figure: Any, low: float, high: float) -> None:
    """Draw the colours with their two ends below the columns, as cells: a colorbar is an image."""
    height = figure.get_figheight() * 72
    bar = figure.add_axes(((WIDTH - 172) / WIDTH, 9 / height, 120 / WIDTH, 10 / height))
    bar.pcolormesh([range(LEGEND_CELLS)], cmap="viridis", edgecolors="face", lw=0.5)
    bar.set_axis_off()
    for x, side, value in ((-0.05, "right", low), (1.05, "left", high)):
        bar.text(x, 0.5, number_text(value), ha=side, va="center", transform=bar.transAxes)
