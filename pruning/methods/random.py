"""Random: the control that every other method must beat."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Int64
from torch import Tensor

from pruning.methods.interface import Statistics, Weights, option
from pruning.methods.seeds import permutations
from pruning.spaces import KINDS, Kind, Space, check_count
from pruning.statistics import Statistic


@dataclass(frozen=True)
class Random:
    """Keep the first k channels of one random permutation per head (arXiv 2602.04852).

    The permutations depend on the seed and the space's name alone, so that they are the same
    whatever else is pruned and on however many processes, and a smaller k keeps a subset. There
    are no scores: a random allocation of widths would be another control.
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
