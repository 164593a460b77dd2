"""Grids: a heat map with a row and a column for each value, and the kept channels of heads."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from launch.drawing.figure import BOTTOM, LEFT, WIDTH, axes, colour, picture

NUMBERED_WIDTH, NUMBERED_HEIGHT = 20.0, 14.0
"""Width and height, in points, of the smallest cell that shows its number."""

LEGEND_CELLS = 40


def heat_map(
    rows: Mapping[str, Sequence[float]],
    labels: tuple[str, str],
    title: str,
    extent: tuple[float, float] | None = None,
) -> str:
    """Return an SVG with a row for each entry of `rows` and a column for each of its values.

    Args:
        rows: values by the label of their row, at least one; without a colour if not finite.
        labels: what the rows and the columns are.
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
    """Return the smallest and the largest finite value of `rows`; 0 and 1 if there is none."""
    values = [value for row in rows.values() for value in row if math.isfinite(value)]
    return (min(values), max(values)) if values else (0.0, 1.0)


def channel_grid(kept: Sequence[Sequence[int]], head_dim: int, title: str) -> str:
    """Return an SVG with a row for each head and a column for each channel, filled if kept.

    Args:
        kept: channels kept in each head, in increasing order.
        head_dim: channels that a head had before pruning.
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
    """Return the stretches of consecutive integers in increasing `numbers` as (first, count)."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and number == sum(found[-1]):
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((number, 1))
    return found


def number_text(value: float, tight: bool = False) -> str:
    """Return `value` in one to three digits; if `tight`, mostly two and no leading zero."""
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
    """Return one patch of boxes (row, first column, columns) with `gap` free above and below."""
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
    """Draw the scale of colours below the columns, as cells: a colorbar would be an image."""
    height = figure.get_figheight() * 72
    bar = figure.add_axes(((WIDTH - 172) / WIDTH, 9 / height, 120 / WIDTH, 10 / height))
    bar.pcolormesh([range(LEGEND_CELLS)], cmap="viridis", edgecolors="face", lw=0.5)
    bar.set_axis_off()
    for x, side, value in ((-0.05, "right", low), (1.05, "left", high)):
        bar.text(x, 0.5, number_text(value), ha=side, va="center", transform=bar.transAxes)
