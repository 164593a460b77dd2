"""Random numbers of a space: the same whatever else is pruned, and on however many processes."""

import hashlib

import torch
from jaxtyping import Int64
from torch import Tensor

from pruning.spaces import Space


def permutations(space: Space, seed: int) -> Int64[Tensor, "H d"]:
    """A random order of the channels of each head, from the seed and the space's name alone."""
    digest = hashlib.sha256(f"{seed}:{space.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    orders = [torch.randperm(space.head_dim, generator=generator) for _ in range(space.num_heads)]
    return torch.stack(orders)
