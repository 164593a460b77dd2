"""Sums of outer products of rows: the Gram matrices that statistics hold.

Two ways, for a device to choose from (`pruning.calibration.products`). In float64 every product is
exact for activations of 32 bits or fewer, and the sums round in the sixteenth digit. In short
pieces, L rows are multiplied and added in float32, and the pieces' matrices are added in float64:
for devices on which float64 is 32 or 64 times slower.

How much a piece rounds. Products of bfloat16 or float16 numbers are exact in float32, those of
float32 numbers are within fused multiply-adds. Each of a piece's L additions rounds by at most
u = 2^-24 of a partial sum, or 2^-23 where a matrix unit cuts off digits (Fasi, Higham, Mikaitis and
Pranesh, PeerJ Comput. Sci. 7, 2021), and no partial sum of x_i x_j exceeds that of |x_i x_j|. Rows
that come in float64 are rounded first, which is two more u. So, by Cauchy and Schwarz, a whole
matrix G differs from the exact one by

    |error_ij| <= ERROR sqrt(G_ii G_jj),   ERROR = (L + 2) 2^-23,

whatever the order of the additions, the number of rows and the scales of the channels; in practice
by a hundredth of it, as errors of pieces are independent. Strong rank-revealing QR compares squared
lengths, which span the square of the condition. What it keeps was the same from pieces as from
float64 for all spectra tried, up to a condition of 1e4, with pieces of 64 rows of bfloat16 (whose
own rounding floors the spectrum) and 16 rows of float32; 64 rows of float32 changed 2 of 48
choices.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float, Float64
from torch import Tensor

AddProducts = Callable[..., None]
"""Adds to a float64 Gram matrix `[H, d, d]` the outer products of rows `[n, m, H, d]` with
themselves, of any number of tensors; called as `add_products_` is."""

SCRATCH = 2**24
"""Numbers of the pieces' matrices that are held at once."""


def add_products_(gram: Float64[Tensor, "H d d"], *rows: Float[Tensor, "n m H d"]) -> None:
    """Add the outer products of the rows with themselves, in float64."""
    for x in rows:
        by_head = x.detach().flatten(0, 1).transpose(0, 1)
        # In one copy: products of rows that lie apart take a quarter longer.
        wide = by_head.to(torch.float64, memory_format=torch.contiguous_format)
        gram.baddbmm_(wide.mT, wide)


def add_products_in_pieces_(
    gram: Float64[Tensor, "H d d"], *rows: Float[Tensor, "n m H d"]
) -> None:
    """Add the outer products of the rows with themselves, each short piece's sum in float32.

    The module says how large the error is.
    """
    heads, d = gram.shape[0], gram.shape[-1]
    with ieee_products():
        for x in rows:
            length = piece_length(x.dtype)
            tokens = x.detach().flatten(0, 1)
            at_once = max(SCRATCH // (heads * d * d), 1) * length
            for some in tokens.split(at_once):
                whole = len(some) // length * length
                for part, size in ((some[:whole], length), (some[whole:], len(some) - whole)):
                    if len(part):
                        pieces = part.float().unflatten(0, (-1, size)).permute(2, 0, 3, 1)
                        gram += (pieces @ pieces.mT).sum(1, dtype=torch.float64)


class SumOfProducts:
    """A statistic that sums outer products, in float64 unless a calibration hands it another way.

    It is no field: how sums are made is not part of them.
    """

    add_products_: AddProducts = staticmethod(add_products_)


def piece_length(dtype: torch.dtype) -> int:
    """Rows that are summed in float32: 64 of 16 bits each, 16 of wider ones."""
    return 64 if dtype.itemsize == 2 else 16


def error_bound(dtype: torch.dtype) -> float:
    """The largest error of an entry of a matrix summed in pieces, over `sqrt(G_ii G_jj)`."""
    return (piece_length(dtype) + 2) * 2.0**-23


@contextmanager
def ieee_products() -> Iterator[None]:
    """Keep CUDA's float32 products from being cut to TF32 in the block, whatever a user allows."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before
