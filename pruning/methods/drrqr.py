"""DRRQR: keep the channels on which queries and keys are best conditioned."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float64, Int64
from torch import Tensor

from flame.options import option
from pruning.linalg import check_bound, strong_rrqr
from pruning.methods.interface import Statistics, Weights, summed
from pruning.methods.seeds import permutations
from pruning.spaces import Kind, Space, check_count
from pruning.statistics import QueryKeyGram, QueryKeySample, Statistic
from pruning.statistics.row_sample import SAMPLE_ROWS


@dataclass(frozen=True)
class DeltaRuleRRQR:
    """Strong rank-revealing QR of each head's queries stacked on its keys (arXiv 2602.04852).

    The paper stops after 20 swaps, which voids the bound, and takes a random subset of 5,000 rows;
    here the swaps run to their end and every row counts, unless the options say otherwise. It has
    no scores: channels are chosen as a set, and none has a worth of its own.
    """

    name: ClassVar[str] = "drrqr"
    kinds: ClassVar[tuple[Kind, ...]] = ("key",)
    needs: ClassVar[tuple[type[Statistic], ...]] = (QueryKeyGram, QueryKeySample)
    paper: ClassVar[Mapping[str, Any]] = {"max_swaps": 20, "rows": SAMPLE_ROWS}

    f: float = option(1.5, "bound of the strong rank-revealing QR, above 1; lower is tighter")
    max_swaps: int | None = option(
        None, "stop after so many swaps per head, giving up the bound (the paper: 20)"
    )
    rows: int | None = option(
        None, f"use a random subset of so many rows of [Q; K] (the paper's {SAMPLE_ROWS} or all)"
    )
    permute_columns: bool = option(
        False, "put the channels in a random order first, which decides between equal ones"
    )
    seed: int = option(0, "seed of that order")

    def __post_init__(self) -> None:
        check_bound(self.f, self.max_swaps)
        if self.rows not in (None, SAMPLE_ROWS):
            raise ValueError(
                f"rows is {self.rows}: calibration sums all rows and a random {SAMPLE_ROWS} of "
                f"them, so give {SAMPLE_ROWS} or leave it out"
            )

    def select(
        self, space: Space, k: int, weights: Weights, statistics: Statistics
    ) -> Int64[Tensor, "H k"]:
        """The k channels of each head that satisfy the Gu-Eisenstat bound for `f`."""
        check_count(k, space.head_dim, f"{space.noun} of {space.name}")
        gram = self._gram(space, statistics)
        if not self.permute_columns:
            return strong_rrqr(gram, k, self.f, self.max_swaps)
        order = permutations(space, self.seed)
        rows = gram.gather(1, order[:, :, None].expand_as(gram))
        permuted = rows.gather(2, order[:, None, :].expand_as(gram))
        kept = strong_rrqr(permuted, k, self.f, self.max_swaps)
        return order.gather(1, kept).sort(dim=-1).values

    def _gram(self, space: Space, statistics: Statistics) -> Float64[Tensor, "H d d"]:
        kind: type[QueryKeyGram | QueryKeySample]
        kind = QueryKeyGram if self.rows is None else QueryKeySample
        return summed(statistics, kind, space, self).gram.cpu()
