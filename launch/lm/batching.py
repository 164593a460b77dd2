"""Requests in groups and batches: which go together, and how rows of tokens become tensors."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any, TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")

Tokens = tuple[int, ...]
Scored = tuple[float, bool]
"""Log-likelihood in nats, and whether greedy decoding would give the same tokens."""


def alike(requests: Sequence[Any]) -> list[list[int]]:
    """Group the requests' positions by context, longest context first.

    Requests with an empty context are grouped by their text instead.
    """

    def key(n: int) -> tuple[int, str]:
        context, *rest = requests[n].args
        text = context or "".join(part for part in rest if isinstance(part, str))
        return -len(text), text

    order = sorted(range(len(requests)), key=key)
    return [list(group) for _, group in groupby(order, key=key)]


def batches(
    items: Iterable[Item], length: Callable[[Item], int], most: int, tokens: int
) -> Iterator[list[Item]]:
    """Yield batches of items of similar length, longest first.

    Args:
        length: tokens of an item.
        most: items a batch at most.
        tokens: tokens a batch at most, padding counted; a single item may have more.
    """
    ordered = sorted(items, key=length, reverse=True)
    start = 0
    while start < len(ordered):
        size = max(1, min(most, tokens // max(1, length(ordered[start]))))
        yield ordered[start : start + size]
        start += size


def padded(rows: Sequence[Tokens], fill: int, left: bool) -> Tensor:
    """`rows` as one tensor int64 `[B, T]`, shorter ones filled on the left or on the right."""
    width = max(map(len, rows))
    blanks = [[fill] * (width - len(row)) for row in rows]
    filled = [[*b, *row] if left else [*row, *b] for row, b in zip(rows, blanks, strict=True)]
    return torch.tensor(filled, dtype=torch.int64)


def score(logits: Tensor, continuation: Sequence[int]) -> Scored:
    """Score `continuation`, not empty, by the last rows of `logits` `[T, V]`, in fp32."""
    targets = torch.tensor(continuation, device=logits.device)
    log_probabilities = logits[-len(continuation) :].float().log_softmax(-1)
    chosen = log_probabilities.gather(-1, targets[:, None])
    greedy = bool((log_probabilities.argmax(-1) == targets).all())
    return float(chosen.double().sum()), greedy
