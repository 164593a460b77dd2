"""Which rows of [Q; K] a random subset takes, known before the first token is read."""

from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Tensor

SAMPLE_ROWS = 5000
"""Rows of the subset in arXiv 2602.04852's code."""


@dataclass(frozen=True)
class RowSample:
    """A uniform subset, without repetition, of the queries and keys of a whole calibration."""

    tokens: int
    """Of each sequence; each has a query and a key in every head."""
    chosen: Int64[Tensor, " n"]
    """Numbers of the rows, increasing: tokens in the order of the data, queries before keys."""
    all_tokens: int
    """Of the calibration."""

    def of_sequence(self, number: int) -> tuple[Int64[Tensor, " nq"], Int64[Tensor, " nk"]]:
        """The tokens of the `number`-th sequence whose query, and those whose key, are chosen."""
        first = number * self.tokens
        queries, keys = (self._between(first + offset) for offset in (0, self.all_tokens))
        return queries, keys

    def _between(self, first: int) -> Int64[Tensor, " n"]:
        bounds = torch.tensor([first, first + self.tokens])
        start, end = torch.searchsorted(self.chosen, bounds).tolist()
        return self.chosen[start:end] - first


def row_sample(sequences: int, seq_len: int, seed: int, rows: int = SAMPLE_ROWS) -> RowSample:
    """`rows` of the 2 · sequences · seq_len rows, by the seed alone; all of them if they are fewer.

    Drawn by the hundred where they are few among many, so that memory holds the subset only.
    """
    total = 2 * sequences * seq_len
    generator = torch.Generator().manual_seed(seed)
    if total <= 16 * rows:
        chosen = torch.randperm(total, generator=generator)[:rows]
    else:
        chosen = _distinct(total, rows, generator)
    return RowSample(seq_len, chosen.sort().values, total // 2)


def _distinct(total: int, rows: int, generator: torch.Generator) -> Int64[Tensor, " n"]:
    """The first `rows` different ones of a stream of random numbers below `total`."""
    drawn = torch.randint(total, (2 * rows,), generator=generator)
    order = drawn.sort(stable=True)
    first = torch.ones(len(drawn), dtype=torch.bool)
    first[1:] = order.values[1:] != order.values[:-1]
    return drawn[order.indices[first].sort().values[:rows]]
