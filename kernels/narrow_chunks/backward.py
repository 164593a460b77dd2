"""The backward steps, with the names, arguments and results of those of fla 0.6.0.

They are called one after the other, after the forward's W, U, states and V_new were computed again;
shapes are those of `kernels.narrow_chunks.forward`.
"""

import torch
import triton
from torch import Tensor

from kernels.narrow_chunks.output_gradients import (
    output_gradients_kernel,
    own_value_gradients_kernel,
)
from kernels.narrow_chunks.pieces import CHUNK, Chunks, pieces
from kernels.narrow_chunks.state_gradients import carry_gradients_kernel
from kernels.narrow_chunks.writes import write_gradients_kernel


def chunk_bwd_dv_local(
    q: Tensor,
    k: Tensor,
    do: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    A: Tensor | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = CHUNK,
    chunk_indices: Tensor | None = None,
) -> Tensor:
    """Return the part of V_new's gradient that comes from its own chunk; as fla 0.6.0's."""
    B, T, H, K = q.shape
    HV, V = do.shape[2:]
    cut = Chunks.of(q, cu_seqlens, chunk_indices)
    dv = torch.empty_like(do)
    own_value_gradients_kernel[(cut.count * HV,)](
        q, k, g, do, dv, cu_seqlens, cut.indices, K**-0.5 if scale is None else scale, T,
        H=H, HV=HV, K=K, V=V, PIECES=pieces(K),
    )  # fmt: skip
    return dv


def chunk_gated_delta_rule_bwd_dhu(
    q: Tensor,
    k: Tensor,
    w: Tensor,
    do: Tensor,
    dv: Tensor,
    g: Tensor | None = None,
    gk: Tensor | None = None,
    h0: Tensor | None = None,
    dht: Tensor | None = None,
    scale: float | None = None,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = CHUNK,
    chunk_indices: Tensor | None = None,
    chunk_offsets: Tensor | None = None,
    use_graph: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return the gradients of the states after each chunk, of `h0`, and of V_new; as fla 0.6.0's.

    Args:
        do, dv: `[B, T, HV, V]`; `dv` is the part of V_new's gradient from its own chunk's outputs.
        dht: that of the final states, `[N, HV, K, V]`, or `[N, HV, V, K]` with `state_v_first`.
    """
    B, T, H, K = q.shape
    HV, V = do.shape[2:]
    cut = Chunks.of(q, cu_seqlens, chunk_indices, chunk_offsets)
    dstates = q.new_empty(B, cut.a_row, HV, *((V, K) if state_v_first else (K, V)))
    dinitial = None if h0 is None else torch.empty_like(h0, dtype=torch.float32)
    dv_new = torch.empty_like(dv)
    carry_gradients_kernel[lambda meta: (triton.cdiv(V, meta["BV"]) * cut.documents * HV,)](
        q, k, w, g, gk, dht, dinitial, do, dstates, dv, dv_new, cu_seqlens, cut.offsets,
        K**-0.5 if scale is None else scale, T,
        H=H, HV=HV, K=K, V=V, PIECES=pieces(K), V_FIRST=state_v_first,
    )  # fmt: skip
    return dstates, dinitial, dv_new


def chunk_bwd_dqkwg(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    h: Tensor,
    dh: Tensor,
    w: Tensor | None = None,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    dv: Tensor | None = None,
    scale: float | None = None,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = CHUNK,
    chunk_indices: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the gradients of q, k, w and the running sums g; as fla 0.6.0's.

    Args:
        v: V_new; dv: its gradient; h: the states before each chunk; dh: gradients of those after.

    That of k lacks what comes through w and u.
    """
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    cut = Chunks.of(q, cu_seqlens, chunk_indices)
    dq, dk, dw = (q.new_empty(B, T, HV, K) for _ in range(3))
    dg = None if g is None else torch.empty_like(g, dtype=torch.float32)
    output_gradients_kernel[(cut.count * HV,)](
        q, k, v, g, h, do, dh, dv, dq, dk, dw, dg, cu_seqlens, cut.indices,
        K**-0.5 if scale is None else scale, T,
        H=H, HV=HV, K=K, V=V, PIECES=pieces(K), V_FIRST=state_v_first,
    )  # fmt: skip
    return sum_groups(dq, H), sum_groups(dk, H), dw, dg


def prepare_wy_repr_bwd(
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    A: Tensor,
    dw: Tensor,
    du: Tensor,
    g: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_indices: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the gradients of k, v, beta and g that come through W and U; as fla 0.6.0's.

    With `recompute_w_u_fwd`'s arguments, and the gradients of its results.
    """
    B, T, H, K = k.shape
    HV, V = v.shape[2:]
    cut = Chunks.of(k, cu_seqlens, chunk_indices)
    dk, dv, dbeta = k.new_empty(B, T, HV, K), torch.empty_like(v), torch.empty_like(beta)
    dg = None if g is None else torch.empty_like(g)
    write_gradients_kernel[(cut.count * HV,)](
        k, v, beta, g, A, dw, du, dk, dv, dbeta, dg, cu_seqlens, cut.indices, T,
        H=H, HV=HV, K=K, V=V, PIECES=pieces(K),
    )  # fmt: skip
    return sum_groups(dk, H), dv, dbeta, dg


def sum_groups(x: Tensor, key_heads: int) -> Tensor:
    """Return `[B, T, key_heads, K]` from `[B, T, HV, K]`: sums over a key head's value heads."""
    if x.shape[2] == key_heads:
        return x
    return x.unflatten(2, (key_heads, -1)).sum(3)
