"""Key channels in power-of-two pieces, chunks and autotuning: what is decided before a launch.

Triton's tiles have power-of-two sides, so a kernel that takes 96 key channels as blocks of 64
multiplies 128. Here 96 are a piece of 64 and one of 32, each of the width that it has.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import triton
from fla.ops.utils import prepare_chunk_indices, prepare_chunk_offsets
from torch import Tensor

from kernels.triton_support import INTERPRETED

CHUNK = 64
"""Tokens a chunk, in all kernels here."""
LARGEST_PIECE = 64
"""So that accumulators of one piece leave registers for the rest."""
STEP, MAX_KEYS = 16, 256
"""A piece is a multiple of what one matrix instruction takes; fla's own kernels end at 256."""

Pieces = tuple[tuple[int, int], ...]


def pieces(key_width: int) -> Pieces:
    """Return (first channel, channels) of the powers of two that add up to `key_width`.

    None is larger than `LARGEST_PIECE`, and the wide come first: 112 is 64, 32 and 16. Raises
    ValueError for a width that is not a multiple of 16, or above 256.
    """
    if key_width % STEP or not STEP <= key_width <= MAX_KEYS:
        raise ValueError(
            f"{key_width} key channels: the kernels take multiples of {STEP} up to {MAX_KEYS}"
        )
    found, start = [], 0
    while start < key_width:
        width = min(LARGEST_PIECE, 1 << (key_width - start).bit_length() - 1)
        found.append((start, width))
        start += width
    return tuple(found)


def tuned(configs: Sequence[triton.Config], key: Sequence[str]) -> Callable[[Any], Any]:
    """Return Triton's autotuner over `configs`, which keeps its choices on disk.

    It tries each once for every new value of the arguments `key` and of the dtypes. Interpreted
    kernels are not timed: they take the first.
    """
    tried = list(configs[:1] if INTERPRETED else configs)
    return triton.autotune(tried, list(key), cache_results=not INTERPRETED)


@dataclass(frozen=True)
class Chunks:
    """How rows, or packed documents, are cut into chunks."""

    documents: int
    a_row: int
    """Chunks of one row; with packed documents, which are one row, of all."""
    count: int
    indices: Tensor | None
    """`[chunks, 2]`: document, and number of the chunk in it; None if each row is a document."""
    offsets: Tensor | None
    """`[documents + 1]`: chunks before each document; None if each row is a document."""

    @classmethod
    def of(
        cls,
        x: Tensor,
        cu_seqlens: Tensor | None,
        indices: Tensor | None = None,
        offsets: Tensor | None = None,
    ) -> "Chunks":
        """Cut `x` `[B, T, ...]`; what a caller knows of a packing is not computed again."""
        if cu_seqlens is None:
            a_row = triton.cdiv(x.shape[1], CHUNK)
            return cls(x.shape[0], a_row, x.shape[0] * a_row, None, None)
        if indices is None:
            indices = prepare_chunk_indices(cu_seqlens, CHUNK)
        if offsets is None:
            offsets = prepare_chunk_offsets(cu_seqlens, CHUNK)
        return cls(len(cu_seqlens) - 1, len(indices), len(indices), indices, offsets)
