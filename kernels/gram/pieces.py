"""A Triton kernel: sums of outer products of 16-bit rows, exact but for float32 sums of 64 rows.

A program has one head, one pair of blocks of 64 channels and a run of pieces of 64 rows. A piece's
products are exact in float32, where they are summed by the matrix unit; pieces are added to an
unevaluated sum of two float32 numbers (Knuth's TwoSum), which is as good as float64 and needs none.
The runs' sums are added in float64. `kernels/README.md` has bytes, operations and the floor.
"""

import torch
import triton
from jaxtyping import Float, Float64
from torch import Tensor

from kernels.gram.kernel import gram_kernel
from kernels.triton_support import INTERPRETED, runs_on

ROWS = 64
"""Rows of a piece."""
TILE = 64
"""Channels of a block."""
PROGRAMS = 256
"""Programs that fill a GPU; more runs of pieces than that need are not made."""
WIDTHS = range(16, 257, 8)


def takes(*rows: Tensor) -> bool:
    """Return whether the kernel runs on these rows `[n, m, H, K]`: one tensor or two."""
    first = rows[0]
    return (
        len(rows) <= 2
        and runs_on(*rows)
        and first.dtype in (torch.bfloat16, torch.float16)
        and first.shape[-1] in WIDTHS
        and all(x.dtype == first.dtype and x.shape[2:] == first.shape[2:] for x in rows)
    )


@torch.no_grad()
def gram_matrices(*rows: Float[Tensor, "n m H K"]) -> Float64[Tensor, "H K K"]:
    """Return for each head the sum of the outer products of its rows with themselves.

    The rows of both tensors are summed together. Give what `takes`. An entry's error is at most
    `66 * 2**-23 * sqrt(G_ii G_jj)` (`pruning.statistics.products` derives it).
    """
    heads, width = rows[0].shape[2:]
    left, right = (_flat(x) for x in (rows[0], rows[-1]))
    second = len(right) if len(rows) == 2 else 0
    tiles = triton.cdiv(width, TILE)
    pairs = tiles * (tiles + 1) // 2
    pieces = max(triton.cdiv(max(len(left), second), ROWS), 1)
    runs = min(triton.cdiv(PROGRAMS, pairs * heads), pieces)
    sums = torch.empty(runs, 2, heads, width, width, dtype=torch.float32, device=left.device)
    gram_kernel[(pairs, heads, runs)](
        left, right, sums, len(left), second, *left.stride()[:2], *right.stride()[:2],
        triton.cdiv(pieces, runs), heads, width, ROWS=ROWS, TILE=TILE, WIDEN=INTERPRETED,
    )  # fmt: skip
    # A block of a channel with itself is no more symmetric than the products that made it.
    lower = sums.sum((0, 1), dtype=torch.float64).tril()
    return lower + lower.tril(-1).mT


def _flat(x: Float[Tensor, "n m H K"]) -> Float[Tensor, "rows H K"]:
    flat = x.detach().flatten(0, 1)
    return flat if flat.stride(-1) == 1 else flat.contiguous()
