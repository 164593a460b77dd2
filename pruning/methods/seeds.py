"""Random numbers of a space: the same whatever else is pruned, and on however many processes."""

import hashlib

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from pruning.spaces import Space


def permutations(space: Space, seed: int) -> Int64[Tensor, "H d"]:
    """A random order of the channels of each head, from the seed and the space's name alone."""
    generator = _generator(f"{seed}:{space.name}")
    orders = [torch.randperm(space.head_dim, generator=generator) for _ in range(space.num_heads)]
    return torch.stack(orders)


def uniform_scores(space: Space, seed: int) -> Float64[Tensor, "H d"]:
    """Independent numbers, uniform in [0, 1), that fall along each head's `permutations`."""
    generator = _generator(f"{seed}:{space.name}:scores")
    shape = (space.num_heads, space.head_dim)
    numbers = torch.rand(shape, generator=generator, dtype=torch.float64)
    falling = numbers.sort(dim=-1, descending=True).values
    return torch.empty_like(falling).scatter_(1, permutations(space, seed), falling)


def _generator(name: str) -> torch.Generator:
    digest = hashlib.sha256(name.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
