"""Softmax attention of fla's hybrids by PyTorch's SDPA, where flash-attn is not.

The functions have the names and, as far as fla's `Attention` uses them, the arguments of flash-attn
2. Causality is aligned to the end: the last query sees all keys. Queries of a group share a key
head. Packed documents are attended to one after another, so that memory grows with the longest.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

__all__ = ["flash_attn_func", "flash_attn_varlen_func"]


def flash_attn_func(
    q: Float[Tensor, "B T H D"],
    k: Float[Tensor, "B S G D"],
    v: Float[Tensor, "B S G D"],
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> Float[Tensor, "B T H D"]:
    """Return softmax(q kᵀ / √D) v over the keys that each query sees.

    Args:
        window_size: how many keys a query sees before and after its own position; -1 is all.

    Raises:
        ValueError: there are more queries than keys, some of which would see none.
    """
    if q.shape[1] > k.shape[1]:
        raise ValueError(f"{q.shape[1]} queries for {k.shape[1]} keys: some would see none")
    before, after = window_size[0], 0 if causal else window_size[1]
    whole = causal and before < 0 and q.shape[1] == k.shape[1]
    mask = None if whole else _visible(q, k, before, after)
    out = scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=whole,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


def flash_attn_varlen_func(
    q: Float[Tensor, "T H D"],
    k: Float[Tensor, "S G D"],
    v: Float[Tensor, "S G D"],
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> Float[Tensor, "T H D"]:
    """`flash_attn_func` within each of the documents that `cu_seqlens_q` and `_k` bound.

    The lengths of the longest documents, which flash-attn needs, are not used.
    """
    queries, keys = (bounds.diff().tolist() for bounds in (cu_seqlens_q, cu_seqlens_k))
    parts = q[None].split(queries, 1), k[None].split(keys, 1), v[None].split(keys, 1)
    documents = zip(*parts, strict=True)
    outputs = [flash_attn_func(*each, causal, window_size) for each in documents]
    return torch.cat(outputs, 1)[0]


def _visible(q: Tensor, k: Tensor, before: int, after: int) -> Tensor | None:
    """Which keys each query sees, [T, S], or None if each sees all."""
    length, keys = q.shape[1], k.shape[1]
    if length == 1 and after <= 0 and (before < 0 or before >= keys - 1):
        return None
    own = torch.arange(keys - length, keys, device=q.device)[:, None]
    distance = torch.arange(keys, device=q.device) - own
    mask = torch.ones_like(distance, dtype=torch.bool)
    if before >= 0:
        mask &= distance >= -before
    if after >= 0:
        mask &= distance <= after
    return mask
