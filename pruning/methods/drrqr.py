"""DRRQR: keep the channels on which queries and keys are best conditioned."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Int64
from torch import Tensor

from pruning.linalg import check_bound, strong_rrqr
from pruning.methods.interface import Statistics, Weights, option
from pruning.spaces import Kind, Space, check_count
from pruning.statistics import QueryKeyGram, Statistic


@dataclass(frozen=True)
class DeltaRuleRRQR:
    """Strong rank-revealing QR of each head's queries stacked on its keys (arXiv 2602.04852).

    The paper stops after 20 swaps, which voids the bound; here the swaps run to their end unless
    `max_swaps` says otherwise.
    """

    name: ClassVar[str] = "drrqr"
    kinds: ClassVar[tuple[Kind, ...]] = ("key",)
    needs: ClassVar[tuple[type[Statistic], ...]] = (QueryKeyGram,)

    f: float = option(1.5, "bound of the strong rank-revealing QR, above 1; lower is tighter")
    max_swaps: int | None = option(
        None, "stop after so many swaps per head, giving up the bound (the paper: 20)"
    )

    def __post_init__(self) -> None:
        check_bound(self.f, self.max_swaps)

    def select(
        self, space: Space, k: int, weights: Weights, statistics: Statistics
    ) -> Int64[Tensor, "H k"]:
        """The k channels of each head that satisfy the Gu-Eisenstat bound for `f`."""
        check_count(k, space.head_dim, f"{space.noun} of {space.name}")
        statistic = statistics[QueryKeyGram]
        assert isinstance(statistic, QueryKeyGram)
        if int(statistic.tokens) == 0:
            raise ValueError(f"{space.name}: no tokens were seen, so drrqr has nothing to go by")
        return strong_rrqr(statistic.gram.cpu(), k, self.f, self.max_swaps)
