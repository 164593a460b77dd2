"""Held-out text for perplexity: every token once, with the bytes that the tokens stand for."""

import dataclasses
from collections.abc import Iterator
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from flame.data import corpus
from flame.data.config import DataConfig
from flame.data.documents import Documents
from flame.data.files.local_files import local_path
from flame.data.mixing import MixedDocuments, shares, source_configs
from flame.data.mqar import is_mqar
from flame.data.mqar_tokens import answers_of
from flame.data.packing import (
    IGNORE_INDEX,
    Cursor,
    Packer,
    Predicted,
    Row,
    plain_batch,
    varlen_batch,
)
from flame.data.sources import build_documents
from flame.data.tokenizer import Encoder
from flame.errors import UserError


class Heldout(NamedTuple):
    """A batch of one row of T tokens."""

    inputs: dict[str, Tensor]
    labels: Tensor
    """int64 `[1, T]`; `IGNORE_INDEX` where nothing is predicted."""

    bytes: int
    """UTF-8 bytes of the tokens that the labels ask for."""

    documents: Tensor
    """int64 `[T]`: the number of the document that each label is a token of, from 0 in the set."""


def heldout_sequences(
    config: DataConfig, tokenizer: Any, seq_len: int, max_sequences: int | None = None
) -> Iterator[Heldout]:
    """Yield the held-out documents in order, packed into rows; the last row may be shorter.

    Rows of `seq_len` tokens do not overlap, so each token is predicted once. With `config.varlen`
    the first token of a document is not predicted, and its bytes are not counted. Raises
    `UserError` at the call if the set is missing or has no text.
    """
    encoder = Encoder(tokenizer, config.add_eos)
    documents = heldout_documents(config)
    predicted = answers_of(config.heldout or config.dataset, tokenizer)
    items = (
        _item(row, document, config.varlen, predicted)
        for document, row in _rows(documents, encoder, seq_len)
    )
    first = next(items, None)
    if first is None:
        raise UserError(f"{documents.name} has no text to evaluate on: all its documents are empty")
    return islice(chain([first], items), max_sequences)


def heldout_documents(config: DataConfig) -> Documents:
    """Return the held-out set that the recipe names, in its own order.

    A recipe with `sources` and without `heldout` means the sources' own held-out sets, one document
    of each in turn.
    """
    if config.sources and not config.heldout:
        sources = source_configs(config)
        return MixedDocuments([heldout_documents(own) for own in sources], shares(config))
    own = bool(config.heldout) and config.heldout != config.dataset
    chosen = dataclasses.replace(
        config,
        dataset=config.heldout or config.dataset,
        sources=[],
        weights=[],
        subset="" if own else config.subset,
        revision="" if own else config.revision,
        shuffle=False,
    )
    return build_documents(chosen, config.heldout_split or _default_split(config))


def _default_split(config: DataConfig) -> str:
    if (config.heldout or config.dataset) == corpus.NAME:
        return "heldout"
    if config.heldout and not is_mqar(config.heldout) and local_path(config.heldout) is not None:
        return "train"
    return "validation"


def _rows(documents: Documents, encoder: Encoder, seq_len: int) -> Iterator[tuple[int, Row]]:
    """Yield each row after the number of the document that its first token is of."""
    arrays = encoder.stream_with_bytes(documents.shard(0, 1, 0, 0))
    pieces = enumerate(array for array in arrays if array.size)
    packer = Packer((Cursor(document=number), array) for number, array in pieces)
    first = 0
    while (row := packer.row(seq_len)) is not None:
        yield first, row
        first = packer.cursor.document
    if (row := packer.rest()) is not None:
        yield first, row


def _item(row: Row, document: int, varlen: bool, predicted: Predicted | None) -> Heldout:
    ids = Row(row.tokens[0], row.starts)
    inputs, labels = (varlen_batch if varlen else plain_batch)([ids], predicted)
    sizes = torch.from_numpy(row.tokens[1, 1:])
    begun = np.searchsorted(row.starts, np.arange(1, len(sizes) + 1), side="right")
    return Heldout(
        inputs,
        labels,
        int(sizes[labels[0] != IGNORE_INDEX].sum()),
        torch.from_numpy(document + begun),
    )
