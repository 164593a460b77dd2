"""Cutting documents of any length into chunks.

Every document is cut into chunks of `size` tokens, the last one padded. The chunks are stored level
by level: the first chunk of every document, then the second chunk of those that have one, and so
on, longest documents first. So a step of the recurrence from chunk to chunk advances all documents
and reads one contiguous block. A slot is a place for a token in a chunk.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Bool, Int64
from torch import Tensor


@dataclass(frozen=True)
class ChunkLayout:
    """The cut of one batch of documents into chunks."""

    size: int
    """Tokens per chunk."""
    alive: tuple[int, ...]
    """Number of documents that have an i-th chunk, for each i; decreasing."""
    order: Int64[Tensor, " N"]
    """The documents in decreasing order of length."""
    rank: Int64[Tensor, " N"]
    """The place of each document in `order`."""
    source: Int64[Tensor, " S"]
    """The token in each slot; padding repeats a token."""
    slot: Int64[Tensor, " T"]
    """The slot of each token."""
    filled: Bool[Tensor, " S"]
    """Whether each slot holds a token, and not padding."""
    padded: bool
    """Whether any slot is padding."""
    rows: int | None
    """The number of documents if all are equally long and there is no padding; else None."""

    @property
    def chunks(self) -> int:
        return sum(self.alive)


# The cache outlives a caller's inference mode, whose tensors autograd would refuse later.
@lru_cache(maxsize=64)
@torch.inference_mode(False)
def chunk_layout(lengths: tuple[int, ...], size: int, device: torch.device) -> ChunkLayout:
    """Return the layout of consecutive documents of `lengths` tokens each; 0 is allowed."""
    total = torch.tensor(lengths, dtype=torch.int64)
    counts = (total + size - 1) // size
    order = torch.argsort(counts, descending=True, stable=True)
    levels = int(counts.max()) if len(lengths) else 0
    alive = tuple(int((counts > level).sum()) for level in range(levels))
    document = torch.cat([order[:n] for n in alive]) if alive else order[:0]
    level = torch.repeat_interleave(torch.arange(levels), torch.tensor(alive, dtype=torch.int64))
    offset = level[:, None] * size + torch.arange(size)
    length = total[document, None]
    filled = (offset < length).flatten()
    first = (total.cumsum(0) - total)[document, None]
    source = (first + torch.minimum(offset, length - 1)).flatten()
    slot = torch.empty(int(total.sum()), dtype=torch.int64)
    slot[source[filled]] = torch.nonzero(filled).flatten()
    padded = not bool(filled.all())
    return ChunkLayout(
        size=size,
        alive=alive,
        order=order.to(device),
        rank=torch.argsort(order).to(device),
        source=source.to(device),
        slot=slot.to(device),
        filled=filled.to(device),
        padded=padded,
        rows=len(alive) and alive[-1] if not padded and len(set(lengths)) == 1 else None,
    )


def document_lengths(
    batch: int, tokens: int, cu_seqlens: Tensor | Sequence[int] | None
) -> tuple[int, ...]:
    """Return the lengths of the documents of a `[batch, tokens]` input.

    Args:
        cu_seqlens: the N+1 boundaries of documents packed in one row; None if each row is one.

    Raises:
        ValueError: the boundaries do not rise from 0 to `tokens`, or there are several rows.
    """
    if cu_seqlens is None:
        return (tokens,) * batch
    if batch != 1:
        raise ValueError(
            f"the batch size is {batch}, must be 1 with cu_seqlens: flatten the documents first"
        )
    bounds = cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else list(cu_seqlens)
    lengths = tuple(end - start for start, end in zip(bounds, bounds[1:], strict=False))
    if bounds[0] != 0 or bounds[-1] != tokens or min(lengths, default=0) < 0:
        raise ValueError(
            f"cu_seqlens go from {bounds[0]} to {bounds[-1]}, must rise from 0 to {tokens} tokens"
        )
    return lengths


class _ToChunks(torch.autograd.Function):
    """Gathers tokens into slots; backward gathers too, because padding has no gradient."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, layout: ChunkLayout) -> Tensor:
        ctx.layout = layout
        return tokens.index_select(0, layout.source)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.index_select(0, ctx.layout.slot), None


class _FromChunks(torch.autograd.Function):
    """Gathers slots back into tokens; the gradient of padding is zero."""

    @staticmethod
    def forward(ctx: Any, slots: Tensor, layout: ChunkLayout) -> Tensor:
        ctx.layout = layout
        return slots.index_select(0, layout.slot)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        layout = ctx.layout
        slots = grad.new_zeros(len(layout.source), *grad.shape[1:])
        return slots.index_copy_(0, layout.slot, grad), None


def to_chunks(tokens: Tensor, layout: ChunkLayout) -> Tensor:
    """Return `[B, T, H, ...]` tokens as contiguous `[chunks, H, size, ...]`.

    Padded slots repeat a token and give it no gradient, so the caller must make sure that nothing
    depends on them (in a delta rule beta = 0 does).
    """
    flat = tokens.flatten(0, 1)
    if layout.rows is not None:
        # One copy where a gather and a transposition would be two.
        cut = flat.unflatten(0, (layout.rows, len(layout.alive), layout.size))
        return cut.movedim((1, 3), (0, 2)).flatten(0, 1).contiguous()
    slots = _ToChunks.apply(flat, layout)
    return slots.unflatten(0, (layout.chunks, layout.size)).transpose(1, 2).contiguous()


def from_chunks(slots: Tensor, layout: ChunkLayout, shape: Sequence[int]) -> Tensor:
    """Return the tokens in `[chunks, H, size, D]` as a tensor of `shape` `[B, T, H, D]`."""
    if layout.rows is not None:
        cut = slots.unflatten(0, (len(layout.alive), layout.rows))
        return cut.movedim((0, 2), (1, 3)).reshape(*shape)
    return _FromChunks.apply(slots.transpose(1, 2).flatten(0, 1), layout).reshape(*shape)
