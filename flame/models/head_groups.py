"""Gathering the heads of equal key width, so that one call of the delta rule takes them all.

B rows of T tokens; H key heads of key widths K_h, each with G value heads of width V.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

HeadGroup = tuple[int, ...]
"""Indices of the key heads that share a call, in increasing order."""


def head_groups(keys: Sequence[int]) -> list[HeadGroup]:
    """Group the key heads by key width, the narrowest group first.

    Args:
        keys: the key width of each head.
    """
    return [
        tuple(head for head, key in enumerate(keys) if key == width) for width in sorted(set(keys))
    ]


def gather_keys(
    x: Float[Tensor, "B T rows"], keys: Sequence[int], groups: Sequence[HeadGroup]
) -> list[Float[Tensor, "B T heads K"]]:
    """Split q or k, whose last dimension holds the heads in turn, into a tensor for each group."""
    if len(groups) == 1:
        return [x.unflatten(-1, (len(keys), keys[0]))]
    heads = x.split(list(keys), dim=-1)
    return [torch.stack([heads[head] for head in group], dim=-2) for group in groups]


def gather_heads(x: Tensor, dim: int, count: int, groups: Sequence[HeadGroup]) -> list[Tensor]:
    """Split dimension `dim` of x, the value heads of `count` key heads, by group."""
    if len(groups) == 1:
        return [x]
    dim %= x.ndim
    heads = x.unflatten(dim, (count, -1)).unbind(dim)
    return [torch.stack([heads[h] for h in group], dim).flatten(dim, dim + 1) for group in groups]


def merge_heads(
    parts: Sequence[Float[Tensor, "B T heads V"]], groups: Sequence[HeadGroup]
) -> Float[Tensor, "B T HG V"]:
    """Put the groups' value heads back into the order of the heads; undoes `gather_heads`."""
    if len(groups) == 1:
        return parts[0]
    heads = {
        head: part
        for group, out in zip(groups, parts, strict=True)
        for head, part in zip(group, out.unflatten(2, (len(group), -1)).unbind(2), strict=True)
    }
    return torch.stack([heads[head] for head in sorted(heads)], dim=2).flatten(2, 3)
