"""Documents cut into rows of fixed length, resumable at any token.

A virtual shard's documents lie end to end in one stream of tokens. Row i holds the tokens from i·L
to (i + 1)·L inclusive: its first L tokens are inputs, its last L are labels, and the next row
begins with its last token. A cursor names the first token of the next row, for any L.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flame.data.documents import Documents
from flame.data.files.dealt import DealtDocuments
from flame.data.tokenizer import Encoder
from flame.errors import UserError

IGNORE_INDEX = -100
"""Label where nothing is to be predicted, as torch's cross entropy reads it."""

Array: TypeAlias = NDArray[np.int64]
Batch = tuple[dict[str, Tensor], Tensor]
Predicted = Callable[[Array, Sequence[int]], NDArray[np.bool_]]
"""Takes a row's tokens and where documents start in it; returns which tokens are predicted."""


@dataclass(frozen=True)
class Cursor:
    """A position in a virtual shard."""

    epoch: int = 0
    document: int = 0
    """Number of the document in the shard's order of that epoch."""
    token: int = 0
    """Number of the token in the document."""
    block: int = 0
    """Number of the block of the shard that the document is in, where a set has blocks; the
    document's number is then that in the block."""


class Row(NamedTuple):
    """L + 1 consecutive tokens of a virtual shard."""

    tokens: Array
    """Token ids `[L + 1]`, or `[2, L + 1]` with each token's bytes beside its id."""

    starts: list[int]
    """Positions in 1 … L where a document begins, increasing; 0 is left out."""


class Packer:
    """Cuts documents into rows: `row(length)` takes the next one, `rest` what is left at the end.

    Its attribute `cursor` is the position of the first token of the next row; a packer that is
    made from there goes on with that row, of any length.

    Args:
        pieces: the documents' tokens from `cursor` on, each with the position where it begins.
        cursor: the position of the first token.
    """

    def __init__(self, pieces: Iterator[tuple[Cursor, Array]], cursor: Cursor = Cursor()) -> None:
        self.cursor = cursor
        self._source = pieces
        self._pieces: deque[tuple[Cursor, Array]] = deque()
        self._held = 0

    def row(self, length: int) -> Row | None:
        """Return the next row of `length + 1` tokens, or None if fewer are left."""
        while self._held <= length:
            piece = next(self._source, None)
            if piece is None:
                return None
            self._pieces.append(piece)
            self._held += piece[1].shape[-1]
        return self._cut(length)

    def rest(self) -> Row | None:
        """Return what is left as a shorter row, or None if it has no token with a label."""
        return self._cut(self._held - 1) if self._held > 1 else None

    def _cut(self, length: int) -> Row:
        parts, starts, position = [], [], 0
        for _, tokens in self._pieces:
            if position > length:
                break
            if position > 0:
                starts.append(position)
            parts.append(tokens[..., : length + 1 - position])
            position += tokens.shape[-1]
        self._drop(length)
        return Row(np.concatenate(parts, axis=-1), starts)

    def _drop(self, length: int) -> None:
        self._held -= length
        while length >= (size := self._pieces[0][1].shape[-1]):
            self._pieces.popleft()
            length -= size
        start, tokens = self._pieces[0]
        self.cursor = replace(start, token=start.token + length)
        self._pieces[0] = self.cursor, tokens[..., length:]


def shard_packer(
    documents: Documents,
    encoder: Encoder,
    shard: int,
    num_shards: int,
    *,
    epochs: int | None = None,
    cursor: Cursor = Cursor(),
) -> Packer:
    """Return a packer of one virtual shard from `cursor` on, over `epochs` epochs (None: endless).

    The packer raises `UserError` if an epoch of the shard has no text.
    """
    return Packer(_encoded(documents, encoder, shard, num_shards, epochs, cursor), cursor)


def _encoded(
    documents: Documents,
    encoder: Encoder,
    shard: int,
    num_shards: int,
    epochs: int | None,
    begin: Cursor,
) -> Iterator[tuple[Cursor, Array]]:
    for epoch in count(begin.epoch) if epochs is None else range(begin.epoch, epochs):
        start = begin if epoch == begin.epoch else Cursor(epoch)
        empty = start.document == start.block == 0
        first_place = start.block, start.document
        for block, first, texts in _blocks(documents, shard, num_shards, start):
            for document, tokens in enumerate(encoder.stream(texts), first):
                skipped = start.token if (block, document) == first_place else 0
                empty = empty and tokens.size == 0
                if tokens.size > skipped:
                    yield Cursor(epoch, document, skipped, block), tokens[skipped:]
        if empty:
            raise UserError(
                f"virtual shard {shard} of {num_shards} of {documents.name} has no text: "
                "give more documents, or a smaller data.virtual_shards"
            )


def _blocks(
    documents: Documents, shard: int, num_shards: int, start: Cursor
) -> Iterator[tuple[int, int, Iterator[str]]]:
    """Yield the blocks of a shard from `start` on: number, first document, and texts from there."""
    if not isinstance(documents, DealtDocuments):
        yield 0, start.document, documents.shard(shard, num_shards, start.epoch, start.document)
        return
    for block in range(start.block, documents.num_blocks(shard, num_shards)):
        first = start.document if block == start.block else 0
        yield block, first, documents.block(shard, num_shards, block, first)
    documents.bad_rows.finish()


def varlen_batch(rows: list[Row], predicted: Predicted | None = None) -> Batch:
    """Lay rows end to end, keeping documents and rows apart.

    Args:
        rows: B rows of T + 1 tokens.
        predicted: says which tokens are predicted; None predicts all.

    Returns:
        `input` `[1, B·T]` with `cu_seqlens` `[n + 1]` (strictly increasing from 0 to B·T), and
        labels `[1, B·T]`; all int64. The label is `IGNORE_INDEX` at the last token of each document
        and where the next token is not predicted.
    """
    inputs, labels, bounds, offset = [], [], [0], 0
    for row in rows:
        targets = _targets(row, predicted)
        targets[[start - 1 for start in row.starts]] = IGNORE_INDEX
        length = targets.size
        bounds += [offset + start for start in row.starts if start < length] + [offset + length]
        offset += length
        inputs.append(row.tokens[:-1])
        labels.append(targets)
    batch = {"input": _flat(inputs), "cu_seqlens": torch.tensor(bounds, dtype=torch.int64)}
    return batch, _flat(labels)


def plain_batch(rows: list[Row], predicted: Predicted | None = None) -> Batch:
    """Stack rows to `input` and labels `[B, T]`, without regard to where documents begin.

    Arguments are those of `varlen_batch`.
    """
    inputs = torch.from_numpy(np.stack([row.tokens[:-1] for row in rows]))
    return {"input": inputs}, torch.from_numpy(np.stack([_targets(r, predicted) for r in rows]))


def _targets(row: Row, predicted: Predicted | None) -> Array:
    targets = row.tokens[1:].copy()
    if predicted is not None:
        targets[~predicted(row.tokens, row.starts)[1:]] = IGNORE_INDEX
    return targets


def _flat(parts: list[Array]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts)).unsqueeze(0)
