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
        parts = self._grams(space, statistics)
        return torch.cat([least_error(part, k, space.head_dim) for part in parts])

    def scores(
        self, space: Space, weights: Weights, statistics: Statistics
    ) -> Float64[Tensor, "H d"]:
        """What each channel adds to the squared error of the set that has gone, when it goes.

        One after another until none is left, and each at least what the one before it added, so
        that the scores of a set that goes first add up to its error, or more where a later channel
        takes back what an earlier one did.
        """
        found = []
        for gram in map(_symmetric, self._grams(space, statistics)):
            order, added = _elimination(gram, 0, space.head_dim)
            scores = torch.zeros(len(gram), dtype=torch.float64)
            scores[order] = added.clamp_min(0).cummax(0).values
            found.append(scores.view(-1, space.head_dim))
        return torch.cat(found)

    def _grams(self, space: Space, statistics: Statistics) -> Float64[Tensor, "parts n n"]:
        """Those of heads that are judged apart from each other; whole heads are not."""
        kind = next(kind for kind in self.needs if space.kind in kind.kinds)
        gram: Tensor = summed(statistics, kind, space, self).gram.cpu()  # type: ignore[attr-defined]
        return gram[None] if space.kind in HEAD_KINDS else gram


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
    gram = _symmetric(gram)
    kept = torch.ones(len(gram), dtype=torch.bool)
    kept[_elimination(gram, k, width)[0]] = False
    kept = _exchanged(gram, kept, width)
    return torch.stack([of_head.nonzero().squeeze(-1) for of_head in kept.view(-1, width)])


def _symmetric(gram: Float64[Tensor, "n n"]) -> Float64[Tensor, "n n"]:
    if not bool(gram.isfinite().all()):
        raise ValueError("the output errors hold a NaN or an infinity")
    return (gram + gram.mT) / 2


def _elimination(
    gram: Float64[Tensor, "n n"], k: int, width: int
) -> tuple[Int64[Tensor, " gone"], Float64[Tensor, " gone"]]:
    """The channels that go, one after another until each head has k, and what each adds."""
    kept = torch.ones(len(gram), dtype=torch.bool)
    order, adds = [], []
    tolerance = _tolerance(gram)
    with_dropped = torch.zeros_like(gram[0])
    for _ in range(len(gram) // width * (width - k)):
        can_go = kept & (kept.view(-1, width).sum(1) > k).repeat_interleave(width)
        added = (2 * with_dropped + gram.diagonal()).masked_fill(~can_go, torch.inf)
        channel = int((added <= added.min() + tolerance).nonzero()[-1])
        order.append(channel)
        adds.append(added[channel])
        kept[channel] = False
        with_dropped += gram[channel]
    return torch.tensor(order, dtype=torch.int64), torch.tensor(adds, dtype=torch.float64)


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
