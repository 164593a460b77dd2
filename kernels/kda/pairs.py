"""Decayed products of all pairs of tokens of a chunk, with a decay per key channel.

    P_ij = sum over channels c of x_i[c] k_j[c] exp(G_i[c] - G_j[c]),  j < i

The pairs are cut like a binary tree, so that no exponential overflows and no float64 is needed:
`kernels/README.md` ("A decay per key channel") says how. A level of the tree has pairs of
neighbouring blocks, each block of b = 1, 2, 4, ... C/2 tokens, C being the tokens of a chunk.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Level(NamedTuple):
    """Decays (factors, at most 1) inside the left and the right block of every pair of one level.

    The decay from a token j in the left block to a token i in the right block of the same pair is
    `to_end` of j times `from_start` of i. Backward, a level holds gradients of their logarithms.
    """

    to_end: Float[Tensor, "chunks H pairs b K"]
    """From each token of the left block, its own decay not included, to the end of the block."""
    from_start: Float[Tensor, "chunks H pairs b K"]
    """From the start of the right block to each of its tokens, the token's own decay included."""

    @property
    def size(self) -> int:
        """b, the tokens of a block."""
        return self.to_end.shape[-2]


class Decays(NamedTuple):
    """All decays inside each chunk."""

    start: Float[Tensor, "chunks H C K"]
    """From the start of the chunk to each token, the token's own decay included."""
    end: Float[Tensor, "chunks H C K"]
    """From each token to the end of the chunk."""
    levels: tuple[Level, ...]
    """The levels of the tree, smallest blocks first."""


class PairGradients(NamedTuple):
    """Gradients of the factors of both products."""

    dq: Float[Tensor, "chunks H C K"]
    dk_right: Float[Tensor, "chunks H C K"]
    """Of k as the later token i."""
    dk_left: Float[Tensor, "chunks H C K"]
    """Of k as the earlier token j."""
    dlevels: tuple[Level, ...]
    """Gradients of the logarithms of the decays of each level."""


def decays(g: Float[Tensor, "chunks H C K"]) -> Decays:
    """Return the decays between tokens, from log-decays `g` <= 0 of tokens; C is a power of two."""
    to_end, from_start, levels = torch.zeros_like(g), g.clone(), []
    for size in _sizes(g.shape[-2]):
        left, right = _halves(to_end, size)[0], _halves(from_start, size)[1]
        levels.append(Level(left.exp(), right.exp()))
        _double(to_end, from_start, size)
    return Decays(from_start.exp_(), to_end.exp_(), tuple(levels))


def decays_backward(
    dstart: Float[Tensor, "chunks H C K"],
    dend: Float[Tensor, "chunks H C K"],
    dlevels: tuple[Level, ...],
) -> Float[Tensor, "chunks H C K"]:
    """Return the gradient of `g`, given those of the logarithms of all decays; overwrites them."""
    dto_end, dfrom_start = dend, dstart
    for dlevel in reversed(dlevels):
        _double_backward(dto_end, dfrom_start, dlevel.size)
        _halves(dto_end, dlevel.size)[0].add_(dlevel.to_end)
        _halves(dfrom_start, dlevel.size)[1].add_(dlevel.from_start)
    return dfrom_start


def pair_products(
    q: Float[Tensor, "chunks H C K"],
    k: Float[Tensor, "chunks H C K"],
    levels: tuple[Level, ...],
) -> tuple[Float[Tensor, "chunks H C C"], Float[Tensor, "chunks H C C"]]:
    """Return the products of q_i and k_j for j <= i, and of k_i and k_j for j < i, else zero."""
    with_q = torch.diag_embed((q * k).sum(-1))
    with_k = torch.zeros_like(with_q)
    for level in levels:
        left = (_halves(k, level.size)[0] * level.to_end).mT
        for x, products in ((q, with_q), (k, with_k)):
            _squares(products, level.size).copy_(_right(x, level) @ left)
    return with_q, with_k


def pair_products_backward(
    q: Float[Tensor, "chunks H C K"],
    k: Float[Tensor, "chunks H C K"],
    levels: tuple[Level, ...],
    dwith_q: Float[Tensor, "chunks H C C"],
    dwith_k: Float[Tensor, "chunks H C C"],
) -> PairGradients:
    """Return the gradients of `pair_products`, without the share of the diagonal of `dwith_q`.

    The diagonal has no decay, so it must not enter the gradients of the decays.
    """
    dq, dk_right, dk_left = (torch.zeros_like(x) for x in (q, k, k))
    dlevels = []
    for level in levels:
        left = _halves(k, level.size)[0] * level.to_end
        dleft, dfrom_start = torch.zeros_like(left), torch.zeros_like(left)
        for x, dx, dproducts in ((q, dq, dwith_q), (k, dk_right, dwith_k)):
            dsquare = _squares(dproducts, level.size).contiguous()
            right = _right(x, level)
            dright = dsquare @ left
            dleft += dsquare.mT @ right
            dfrom_start.addcmul_(dright, right)
            _halves(dx, level.size)[1].addcmul_(dright, level.from_start)
        _halves(dk_left, level.size)[0].addcmul_(dleft, level.to_end)
        dlevels.append(Level(dleft.mul_(left), dfrom_start))
    return PairGradients(dq, dk_right, dk_left, tuple(dlevels))


def _right(x: Tensor, level: Level) -> Float[Tensor, "chunks H pairs b K"]:
    return _halves(x, level.size)[1] * level.from_start


def _sizes(chunk: int) -> Iterator[int]:
    size = 1
    while size < chunk:
        yield size
        size *= 2


def _halves(x: Float[Tensor, "... C K"], size: int) -> tuple[Tensor, Tensor]:
    """Views `[..., pairs, size, K]` of the left and of the right block of every pair."""
    blocks = x.unflatten(-2, (-1, 2, size))
    return blocks.select(-3, 0), blocks.select(-3, 1)


def _squares(x: Float[Tensor, "chunks H C C"], size: int) -> Float[Tensor, "chunks H pairs b b"]:
    """A view of the squares (right token, left token) of every pair of blocks."""
    cut = x.unflatten(-1, (-1, 2, size)).unflatten(-4, (-1, 2, size))
    squares = cut[:, :, :, 1, :, :, 0, :]
    return squares.diagonal(dim1=2, dim2=4).permute(0, 1, 4, 2, 3)


def _double(to_end: Tensor, from_start: Tensor, size: int) -> None:
    """Turn the sums inside blocks of `size` into those inside blocks of twice the size."""
    totals = _halves(from_start[..., size - 1 :: size, :], 1)
    left, right = totals[0].clone(), totals[1].clone()
    _halves(to_end, size)[0].add_(right)
    _halves(from_start, size)[1].add_(left)


def _double_backward(dto_end: Tensor, dfrom_start: Tensor, size: int) -> None:
    dright = _halves(dto_end, size)[0].sum(-2, keepdim=True)
    dleft = _halves(dfrom_start, size)[1].sum(-2, keepdim=True)
    totals = _halves(dfrom_start[..., size - 1 :: size, :], 1)
    totals[0].add_(dleft)
    totals[1].add_(dright)
