"""Random: the control that every other method must beat."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float64, Int64
from torch import Tensor

from flame.options import option
from pruning.methods.interface import Statistics, Weights
from pruning.methods.seeds import permutations, uniform_scores
from pruning.spaces import KINDS, Kind, Space, check_count
from pruning.statistics import Statistic


@dataclass(frozen=True)
class Random:
    """Keep the first k channels of one random permutation per head (arXiv 2602.04852).

    The permutations depend on the seed and the space's name alone, so that they are the same
    whatever else is pruned and on however many processes, and a smaller k keeps a subset. Shared
    budgets draw widths at random too: the scores are independent and uniform.
    """

    name: ClassVar[str] = "random"
    kinds: ClassVar[tuple[Kind, ...]] = KINDS
    needs: ClassVar[tuple[type[Statistic], ...]] = ()

    seed: int = option(0, "seed of the random permutations")

    def select(
        self, space: Space, k: int, weights: Weights, statistics: Statistics
    ) -> Int64[Tensor, "H k"]:
        """k channels of each head, uniformly and independently at random."""
        check_count(k, space.head_dim, f"{space.noun} of {space.name}")
        return permutations(space, self.seed)[:, :k].sort(dim=-1).values

    def scores(
        self, space: Space, weights: Weights, statistics: Statistics
    ) -> Float64[Tensor, "H d"]:
        """Independent numbers in [0, 1), in the order in which `select` keeps channels."""
        return uniform_scores(space, self.seed)
