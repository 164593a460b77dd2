"""Bars and channel grids: marks of a report beside its line charts (`launch.drawing.charts`)."""

import math
from collections.abc import Mapping, Sequence
from html import escape

from launch.drawing.charts import LEFT, WIDTH, svg


def channel_grid(kept: Sequence[Sequence[int]], head_dim: int, title: str) -> str:
    """An SVG with a row a head and a column a channel; kept channels are filled.

    Args:
        kept: channels kept in each head, in increasing order.
        head_dim: channels a head had before.
    """
    cell, row = (WIDTH - LEFT - 8) / head_dim, _row_height(len(kept))
    gap = 1.0 if row > 4 else 0.0
    height = len(kept) * row + 26
    every = max(1, math.ceil(12 / row))
    parts = []
    for head, channels in enumerate(kept):
        y = head * row
        path = "".join(
            f"M{LEFT + first * cell:.1f} {y:.1f}h{n * cell:.1f}v{row - gap:.1f}h-{n * cell:.1f}z"
            for first, n in runs(channels)
        )
        frame = f'x="{LEFT}" y="{y:.1f}" width="{head_dim * cell:.1f}" height="{row - gap:.1f}"'
        parts.append(f'<rect class="gone" {frame}/><path class="kept" d="{path}"/>')
        if head % every == 0:
            middle = y + row / 2 + 4
            parts.append(f'<text x="{LEFT - 6}" y="{middle:.1f}" class="end">{head}</text>')
    parts.append(_grid_lines(len(kept), head_dim, row, cell))
    parts += _channel_axis(head_dim, cell, len(kept) * row)
    return svg(WIDTH, height, title, parts)


def runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Consecutive stretches of increasing `numbers` as (first, count)."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and number == sum(found[-1]):
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((number, 1))
    return found


def bars(
    values: Mapping[str, float],
    labels: Mapping[str, str],
    texts: Mapping[str, str],
    log: bool = False,
    mark: float | None = None,
    colour: str = "",
) -> str:
    """HTML bars, one a row: label, bar, value.

    Args:
        values: lengths by name; a value that is not finite has no bar.
        labels, texts: what is written before and behind each bar.
        log: the length is the logarithm of the value; the bar starts at 1.
        mark: a value at which every row gets a thin line, to compare with.
        colour: the class name of all bars; by default each has its own name's.
    """
    finite = [value for value in values.values() if math.isfinite(value)]
    most = max(finite, default=0.0)

    def share(value: float) -> float:
        if not math.isfinite(value) or most <= 0:
            return 0.0
        if log:
            return 100 * math.log(max(value, 1.0)) / max(math.log(most), 1e-12)
        return 100 * max(value, 0.0) / most

    tick = "" if mark is None else f'<span class="mark" style="left:{share(mark):.2f}%"></span>'
    rows = []
    for name, value in values.items():
        fill = f'<span class="fill" style="width:{share(value):.2f}%"></span>'
        rows.append(
            f'<div class="bar m-{escape(colour or name)}">'
            f'<span class="name">{escape(labels.get(name, name))}</span>'
            f'<span class="track">{fill}{tick}</span>'
            f'<span class="value">{escape(texts[name])}</span></div>'
        )
    return f'<div class="bars">{"".join(rows)}</div>'


def _row_height(rows: int) -> float:
    return min(22.0, max(3.0, 160 / max(rows, 1)))


def _grid_lines(rows: int, head_dim: int, row: float, cell: float) -> str:
    """Thin lines between channels, where there is room for them."""
    if cell < 4:
        return ""
    path = "".join(
        f"M{LEFT + column * cell:.1f} 0v{rows * row:.1f}" for column in range(1, head_dim)
    )
    return f'<path class="cells" d="{path}"/>'


def _channel_axis(head_dim: int, cell: float, base: float) -> list[str]:
    step = max(1, head_dim // 4)
    numbers = sorted({*range(0, head_dim - step // 2, step), head_dim - 1})
    y = f'y="{base + 15:.1f}"'
    ticks = [
        f'<text x="{LEFT + (number + 0.5) * cell:.1f}" {y} class="middle">{number}</text>'
        for number in numbers
    ]
    return [*ticks, f'<text x="{LEFT - 6}" {y} class="end label">head</text>']
