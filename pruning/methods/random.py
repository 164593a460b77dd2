"""Random: the control that every other method must beat."""

import hashlib
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Int64
from torch import Tensor

from pruning.methods.interface import Statistics, Weights, option
from pruning.spaces import KINDS, Kind, Space, check_count
from pruning.statistics import Statistic


@dataclass(frozen=True)
class Random:
    """Keep the first k channels of one random permutation per head.

    The permutations depend on the seed and the space's name alone, so that they are the same
    whatever else is pruned and on however many processes, and a smaller k keeps a subset.
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
        generator = torch.Generator().manual_seed(_seed(self.seed, space.name))
        orders = [
            torch.randperm(space.head_dim, generator=generator) for _ in range(space.num_heads)
        ]
        return torch.stack(orders)[:, :k].sort(dim=-1).values


def _seed(seed: int, name: str) -> int:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
