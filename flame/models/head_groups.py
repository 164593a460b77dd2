"""Heads of equal key width, gathered so that one call of the delta rule serves them all.

T tokens in B rows, H key heads of key widths K_h, each with G value heads of width V.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

HeadGroup = tuple[int, ...]
"""Indices of the key heads that share a call, increasing."""


def head_groups(keys: Sequence[int]) -> list[HeadGroup]:
    """The key heads by key width, the narrowest first."""
    return [
        tuple(head for head, key in enumerate(keys) if key == width) for width in sorted(set(keys))
    ]


def gather_keys(
    x: Float[Tensor, "B T rows"], keys: Sequence[int], groups: Sequence[HeadGroup]
) -> list[Float[Tensor, "B T heads K"]]:
    """Rows of q or k, the heads one after another, as one tensor for each group."""
    if len(groups) == 1:
        return [x.unflatten(-1, (len(keys), keys[0]))]
    heads = x.split(list(keys), dim=-1)
    return [torch.stack([heads[head] for head in group], dim=-2) for group in groups]


def gather_heads(x: Tensor, dim: int, count: int, groups: Sequence[HeadGroup]) -> list[Tensor]:
    """Split `dim` of x, the value heads of `count` key heads, into one tensor for each group."""
    if len(groups) == 1:
        return [x]
    dim %= x.ndim
    heads = x.unflatten(dim, (count, -1)).unbind(dim)
    return [torch.stack([heads[h] for h in group], dim).flatten(dim, dim + 1) for group in groups]


def merge_heads(
    parts: Sequence[Float[Tensor, "B T heads V"]], groups: Sequence[HeadGroup]
) -> Float[Tensor, "B T HG V"]:
    """The outputs of the groups' value heads in the order of the heads."""
    if len(groups) == 1:
        return parts[0]
    heads = {
        head: part
        for group, out in zip(groups, parts, strict=True)
        for head, part in zip(group, out.unflatten(2, (len(group), -1)).unbind(2), strict=True)
    }
    return torch.stack([heads[head] for head in sorted(heads)], dim=2).flatten(2, 3)
