"""Rotary position embedding, with the signature of fla 0.6.0's kernel.

Channel pairs are turned by an angle that grows with the position in the document. Position p of a
document turns by row p + offset of the tables; a row before the table, which left padding makes,
gives zeros, as it does in fla.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from kernels.gated_delta_rule.chunk import wide_dtype

__all__ = ["rotary_embedding_fwdbwd"]


def rotary_embedding_fwdbwd(
    x: Float[Tensor, "B T H D"],
    cos: Float[Tensor, "P R"],
    sin: Float[Tensor, "P R"],
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    interleaved: bool = False,
    inplace: bool = False,
    conjugate: bool = False,
    chunk_indices: Tensor | None = None,
) -> Float[Tensor, "B T H D"]:
    """Return `x` with its first 2R channels turned, backwards if `conjugate` (the gradient).

    Args:
        cos, sin: tables by position; R pairs of channels are (i, i + R), or (2i, 2i + 1) if
            `interleaved`.
        seqlen_offsets: the first token's position, one or one a document (a row without
            `cu_seqlens`).
        chunk_indices: what fla's kernel needs; unused.

    Raises:
        ValueError: a document is longer than the tables.
    """
    positions = _positions(x, seqlen_offsets, cu_seqlens)
    if positions.numel() and int(positions.max()) >= len(cos):
        raise ValueError(f"position {int(positions.max())} is beyond {len(cos)} rotary positions")
    rows = positions.clamp(min=0)
    c, s = (table[rows].unsqueeze(2).to(wide_dtype(x)) for table in (cos, sin))
    s = -s if conjugate else s
    turned = x[..., : 2 * cos.shape[1]]
    wide = turned.to(wide_dtype(x))
    if interleaved:
        a, b = wide[..., 0::2], wide[..., 1::2]
        out = torch.stack((a * c - b * s, a * s + b * c), -1).flatten(-2)
    else:
        a, b = wide.chunk(2, -1)
        out = torch.cat((a * c - b * s, a * s + b * c), -1)
    out = out.masked_fill((positions < 0)[..., None, None], 0).to(x.dtype)
    if inplace:
        turned.copy_(out)
        return x
    return torch.cat((out, x[..., out.shape[-1] :]), -1)


def _positions(x: Tensor, offsets: int | Tensor, bounds: Tensor | None) -> Tensor:
    """The position of each token in its document, [B, T] or [1, T]."""
    positions = torch.arange(x.shape[1], device=x.device)[None]
    if bounds is None:
        return positions + (offsets[:, None] if isinstance(offsets, Tensor) else offsets)
    starts = bounds[:-1] - offsets
    return positions - starts.repeat_interleave(bounds.diff(), output_size=x.shape[1])
