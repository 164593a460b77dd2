# mypy: ignore-errors
"""The kernel of `gram_matrices`: one head, one pair of blocks of channels, a run of pieces."""

import triton
import triton.language as tl


@triton.jit
def gram_kernel(
    left, right, sums, left_rows, right_rows,
    left_stride, left_head, right_stride, right_head,
    pieces, heads, width,
    ROWS: tl.constexpr, TILE: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    pair, head, run = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    # Pairs of at most four blocks, the second no later than the first.
    row = (pair >= 1).to(tl.int32) + (pair >= 3).to(tl.int32) + (pair >= 6).to(tl.int32)
    column = pair - row * (row + 1) // 2
    i, j = row * TILE + tl.arange(0, TILE), column * TILE + tl.arange(0, TILE)
    high = tl.zeros((TILE, TILE), tl.float32)
    low = tl.zeros((TILE, TILE), tl.float32)
    high, low = _add_pieces(
        high, low, left + head * left_head, left_rows, left_stride, run * pieces, pieces,
        i, j, width, ROWS, WIDEN,
    )  # fmt: skip
    high, low = _add_pieces(
        high, low, right + head * right_head, right_rows, right_stride, run * pieces, pieces,
        i, j, width, ROWS, WIDEN,
    )  # fmt: skip
    inside = (i < width)[:, None] & (j < width)[None, :]
    size = width * width
    to = sums + ((run * 2).to(tl.int64) * heads + head) * size
    here, mirrored = i[:, None] * width + j[None, :], j[None, :] * width + i[:, None]
    tl.store(to + here, high, mask=inside)
    tl.store(to + mirrored, high, mask=inside)
    tl.store(to + heads * size + here, low, mask=inside)
    tl.store(to + heads * size + mirrored, low, mask=inside)


@triton.jit
def _add_pieces(
    high, low, x, rows, stride, first, pieces, i, j, width,
    ROWS: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    last = tl.minimum(first + pieces, tl.cdiv(rows, ROWS))
    for piece in range(first, last):
        at = piece * ROWS + tl.arange(0, ROWS)
        places = x + at.to(tl.int64)[:, None] * stride
        inside = (at < rows)[:, None]
        a = tl.load(places + i[None, :], mask=inside & (i < width)[None, :], other=0.0)
        b = tl.load(places + j[None, :], mask=inside & (j < width)[None, :], other=0.0)
        if WIDEN:
            # The interpreter cannot multiply bfloat16; a matrix unit multiplies it exactly.
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        product = tl.dot(tl.trans(a), b)
        total = high + product
        added = total - high
        low += (high - (total - added)) + (product - added)
        high = total
    return high, low
