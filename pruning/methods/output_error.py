"""Output error: keep the channels without which the layer's output changes least, as a set."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from pruning.methods.interface import Statistics, Weights, summed
from pruning.spaces import HEAD_KINDS, KINDS, Kind, Space, check_count
from pruning.statistics import HeadOutputErrors, KeyOutputErrors, Statistic, ValueOutputErrors

TIE = 1e-9
"""Errors that differ by less than this part of the error without any channel count as equal."""


@dataclass(frozen=True)
class OutputError:
    """The set of channels whose removal changes the layer's output least, measured.

    The output without each single channel is measured by running the delta rule, norm and gate
    again. The changes of several channels count as added, which for whole heads they are. Channels
    go one by one, the one first that adds least to the squared error of all that have gone; then
    pairs of a channel that went and one that stays change places while that lowers it. It has no
    paper of its own.
    """

    name: ClassVar[str] = "output-error"
    kinds: ClassVar[tuple[Kind, ...]] = KINDS
    needs: ClassVar[tuple[type[Statistic], ...]] = (
        KeyOutputErrors,
        ValueOutputErrors,
        HeadOutputErrors,
    )

    def select(
        self, space: Space, k: int, weights: Weights, statistics: Statistics
    ) -> Int64[Tensor, "H k"]:
        """The k channels of each head that stay, in increasing order."""
        check_count(k, space.head_dim, f"{space.noun} of {space.name}")
        kind = next(kind for kind in self.needs if space.kind in kind.kinds)
        gram = summed(statistics, kind, space, self).gram.cpu()  # type: ignore[attr-defined]
        together = gram[None] if space.kind in HEAD_KINDS else gram
        return torch.cat([least_error(part, k, space.head_dim) for part in together])


def least_error(gram: Float64[Tensor, "n n"], k: int, width: int) -> Int64[Tensor, "heads k"]:
    """The k channels of each head to keep: those dropped have a small sum of `gram` over them.

    Greedy elimination, then exchanges within heads to a local minimum; ties keep the lower index.

    Args:
        gram: symmetric positive semidefinite, of the channels of one or several heads.
        k: channels of each head to keep, 1 to `width`.
        width: channels of each head.

    Raises:
        ValueError: a number is not finite.
    """
    if not bool(gram.isfinite().all()):
        raise ValueError("the output errors hold a NaN or an infinity")
    gram = (gram + gram.mT) / 2
    kept = _exchanged(gram, _eliminated(gram, k, width), width)
    return torch.stack([of_head.nonzero().squeeze(-1) for of_head in kept.view(-1, width)])


def _eliminated(gram: Float64[Tensor, "n n"], k: int, width: int) -> Bool[Tensor, " n"]:
    """Which channels stay after all heads have lost width − k, one channel after another."""
    kept = torch.ones(len(gram), dtype=torch.bool)
    tolerance = _tolerance(gram)
    with_dropped = torch.zeros_like(gram[0])
    for _ in range(len(gram) // width * (width - k)):
        can_go = kept & (kept.view(-1, width).sum(1) > k).repeat_interleave(width)
        added = (2 * with_dropped + gram.diagonal()).masked_fill(~can_go, torch.inf)
        channel = int((added <= added.min() + tolerance).nonzero()[-1])
        kept[channel] = False
        with_dropped += gram[channel]
    return kept


def _exchanged(
    gram: Float64[Tensor, "n n"], kept: Bool[Tensor, " n"], width: int
) -> Bool[Tensor, " n"]:
    """The set after exchanges, each the one that lowers the error most, until none does."""
    kept, tolerance, diagonal = kept.clone(), _tolerance(gram), gram.diagonal()
    while True:
        dropped = (~kept).nonzero().squeeze(-1)
        staying = kept.nonzero().squeeze(-1)
        with_dropped = gram[:, dropped].sum(1)
        going = (2 * with_dropped + diagonal)[staying]
        returning = (diagonal - 2 * with_dropped)[dropped]
        change = going[:, None] + returning - 2 * gram[staying][:, dropped]
        change = change.masked_fill(staying[:, None] // width != dropped // width, torch.inf)
        if change.numel() == 0 or not bool(change.min() < -tolerance):
            return kept
        best = int((change <= change.min() + tolerance).flatten().nonzero()[0])
        kept[staying[best // len(dropped)]] = False
        kept[dropped[best % len(dropped)]] = True


def _tolerance(gram: Float64[Tensor, "n n"]) -> float:
    return TIE * float(gram.diagonal().sum())
