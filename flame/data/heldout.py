"""Held-out text for perplexity: every token once, with the bytes that the predictions stand for."""

import dataclasses
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flame.data import corpus
from flame.data.config import DataConfig
from flame.data.mixing import MixedDocuments, shares, source_configs
from flame.data.mqar import answers_of
from flame.data.packing import (
    IGNORE_INDEX,
    Cursor,
    Packer,
    Predicted,
    Row,
    plain_batch,
    varlen_batch,
)
from flame.data.sources import Documents, build_documents
from flame.data.tokenizer import Encoder
from flame.errors import UserError

Heldout = tuple[dict[str, Tensor], Tensor, int]


def heldout_sequences(
    config: DataConfig, tokenizer: Any, seq_len: int, max_sequences: int | None = None
) -> Iterator[Heldout]:
    """The held-out documents in order, packed into rows of `seq_len` tokens, the last shorter.

    Each item is a batch of one row as `PackedLoader` makes it, and the UTF-8 bytes of the tokens
    that its labels ask for. The rows do not overlap, so a token is predicted once; with
    `config.varlen` the first of each document is not, and its bytes are not counted.

    Raises `UserError` at the call for a missing set, and for one with no text.
    """
    encoder = Encoder(tokenizer, config.add_eos)
    documents = heldout_documents(config)
    predicted = answers_of(config.heldout or config.dataset, tokenizer)
    items = (_item(row, config.varlen, predicted) for row in _rows(documents, encoder, seq_len))
    first = next(items, None)
    if first is None:
        raise UserError(f"{documents.name} has no text to evaluate on: all its documents are empty")
    return islice(chain([first], items), max_sequences)


def heldout_documents(config: DataConfig) -> Documents:
    """The held-out set that the recipe names, in its own order.

    Without one it is those of all `config.sources`, a document of each in turn.
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
    if config.heldout and Path(config.heldout).expanduser().exists():
        return "train"
    return "validation"


def _rows(documents: Documents, encoder: Encoder, seq_len: int) -> Iterator[Row]:
    arrays = encoder.stream_with_bytes(documents.shard(0, 1, 0, 0))
    packer = Packer((Cursor(), array) for array in arrays if array.size)
    while (row := packer.row(seq_len)) is not None:
        yield row
    if (row := packer.rest()) is not None:
        yield row


def _item(row: Row, varlen: bool, predicted: Predicted | None) -> Heldout:
    ids = Row(row.tokens[0], row.starts)
    inputs, labels = (varlen_batch if varlen else plain_batch)([ids], predicted)
    sizes = torch.from_numpy(row.tokens[1, 1:])
    return inputs, labels, int(sizes[labels[0] != IGNORE_INDEX].sum())
