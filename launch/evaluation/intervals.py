"""How sure a mean loss is, and a difference of two, with the documents of a text as the sample.

Tokens of one document are not independent, so the unit is the document, or a block of documents
that follow each other where there are more than `MOST_BLOCKS`. Two models are compared on the same
documents: resampling these leaves out what makes a document hard for both.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST_BLOCKS = 1000
"""Most sums that a record keeps; more documents are joined to blocks of about as many."""

FEWEST = 8
"""Fewest documents from which a standard error or an interval is given."""

RESAMPLES = 2000
LEVEL = 0.95
SEED = 0
"""Of the bootstrap: the same losses give the same interval."""


@dataclass(frozen=True)
class DocumentLosses:
    """What a model loses on each document, or block of documents, of a text."""

    losses: Sequence[float]
    """Negative log-likelihood of the document's predicted tokens, nats."""

    tokens: Sequence[int]
    """Predicted tokens; documents without any are left out."""

    def record(self) -> dict[str, Any]:
        """Both fields, for JSON."""
        return {"losses": list(self.losses), "tokens": list(self.tokens)}


@dataclass(frozen=True)
class Difference:
    """A model's mean loss less another one's on the same documents, nats a token."""

    loss: float
    low: float
    high: float
    """Ends of the interval that holds the difference in `LEVEL` of all draws of documents."""

    documents: int

    @property
    def is_sure(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0

    def text(self) -> str:
        """The difference with its interval, such as `+0.0123 [+0.0101, +0.0144]`."""
        return f"{self.loss:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"

    def record(self) -> dict[str, Any]:
        """All fields, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Estimate:
    """A ratio of two sums over documents, such as a mean over tokens, and how sure it is."""

    value: float
    low: float | None = None
    high: float | None = None
    """Ends of the interval that holds the ratio in `LEVEL` of all draws of documents; None for
    fewer than `FEWEST` documents."""

    @property
    def sign(self) -> int:
        """1 or -1 where the interval leaves out zero, else 0."""
        if self.low is None or self.high is None:
            return 0
        return int(self.low > 0) - int(self.high < 0)


def quotient(above: Sequence[float], below: Sequence[float]) -> Estimate:
    """Σ `above` / Σ `below` over documents, Σ `below` > 0, by a bootstrap over the documents."""
    over, under = np.array(above, dtype=float), np.array(below, dtype=float)
    value = float(over.sum() / under.sum())
    if len(over) < FEWEST:
        return Estimate(value)
    drawn = _draws(len(over))
    return Estimate(value, *_ends((drawn @ over) / (drawn @ under)))


def joined(losses: NDArray[np.float64], tokens: NDArray[np.int64]) -> DocumentLosses:
    """Sums by document, those without tokens left out, joined to at most `MOST_BLOCKS` blocks."""
    losses, tokens = losses[tokens > 0], tokens[tokens > 0]
    if len(tokens) > MOST_BLOCKS:
        starts = np.arange(MOST_BLOCKS) * len(tokens) // MOST_BLOCKS
        losses, tokens = np.add.reduceat(losses, starts), np.add.reduceat(tokens, starts)
    return DocumentLosses(losses.tolist(), tokens.tolist())


def read_losses(record: Mapping[str, Any]) -> DocumentLosses | None:
    """The losses by document that a record of `slimstate eval` holds; None if it has none.

    Raises:
        ValueError: they are no two lists of as many numbers.
    """
    found = record.get("documents")
    if found is None:
        return None
    read = DocumentLosses(*(found[name] for name in ("losses", "tokens")))
    if (
        len(read.losses) != len(read.tokens)
        or not np.isfinite(np.array([read.losses, read.tokens], dtype=float)).all()
    ):
        raise ValueError("documents holds no two lists of as many finite numbers")
    return read


def standard_error(documents: DocumentLosses) -> float | None:
    """Standard error of the mean loss of a token, nats; None for fewer than `FEWEST` documents.

    That of the ratio of two sums over independent documents, to first order:
    sqrt(n / (n - 1) Σ (l_d - r t_d)²) / Σ t_d with r = Σ l_d / Σ t_d.
    """
    losses, tokens = np.array(documents.losses), np.array(documents.tokens, dtype=float)
    count = len(tokens)
    if count < FEWEST:
        return None
    rest = losses - losses.sum() / tokens.sum() * tokens
    return float(math.sqrt(count / (count - 1) * np.square(rest).sum()) / tokens.sum())


def difference(one: DocumentLosses | None, other: DocumentLosses | None) -> Difference | None:
    """The mean loss of `one` less that of `other`, with a paired bootstrap over documents.

    None where either is missing, their documents differ, or are fewer than `FEWEST`.
    """
    if one is None or other is None or list(one.tokens) != list(other.tokens):
        return None
    tokens = np.array(one.tokens, dtype=float)
    if len(tokens) < FEWEST:
        return None
    gaps = np.array(one.losses) - np.array(other.losses)
    drawn = _draws(len(tokens))
    low, high = _ends((drawn @ gaps) / (drawn @ tokens))
    return Difference(float(gaps.sum() / tokens.sum()), low, high, len(tokens))


def won_back(
    pruned: DocumentLosses, recovered: DocumentLosses, control: DocumentLosses
) -> tuple[float, float, float] | None:
    """The share of the gap from `control` to `pruned` that `recovered` is below `pruned`.

    With the ends of its interval, by the bootstrap of `difference`. None unless all three have the
    same documents and `pruned` surely loses more than `control`.
    """
    gap = difference(pruned, control)
    if gap is None or gap.low <= 0 or difference(recovered, control) is None:
        return None
    before, after, best = (np.array(each.losses) for each in (pruned, recovered, control))
    drawn = _draws(len(before))
    low, high = _ends((drawn @ (before - after)) / (drawn @ (before - best)))
    return float((before - after).sum() / (before - best).sum()), low, high


@cache
def _draws(count: int) -> NDArray[np.float64]:
    """How often each of `count` documents is drawn in each of `RESAMPLES` resamples."""
    random = np.random.default_rng(SEED)
    return random.multinomial(count, [1 / count] * count, size=RESAMPLES).astype(float)


def _ends(values: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def differences(
    records: Mapping[str, Mapping[str, Any]],
) -> Iterator[tuple[str, str, Difference]]:
    """Yield (first model, model, difference) for each later model that compares with the first.

    Args:
        records: of `slimstate eval`, by the names of the models.
    """
    names = [name for name, record in records.items() if record.get("documents")]
    for name in names[1:]:
        found = difference(read_losses(records[name]), read_losses(records[names[0]]))
        if found is not None:
            yield names[0], name, found
