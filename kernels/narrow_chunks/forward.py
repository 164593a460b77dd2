"""The forward steps, with the names, arguments and results of those of fla 0.6.0.

They are called one after the other: W and U from the chunks' inverses, the states, the outputs.
Shapes: B rows of T tokens or N packed documents, H key heads of width K, HV value heads of width V.
States are V first, `[..., V, K]`, with `state_v_first`.
"""

import torch
import triton
from torch import Tensor

from kernels.narrow_chunks.outputs import outputs_kernel
from kernels.narrow_chunks.pieces import CHUNK, Chunks, pieces
from kernels.narrow_chunks.states import carry_states_kernel
from kernels.narrow_chunks.writes import writes_kernel


def recompute_w_u_fwd(
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    A: Tensor,
    g: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_indices: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return W `[B, T, HV, K]` and U `[B, T, HV, V]`; as fla 0.6.0's.

    Args:
        A: rows of each chunk's inverse, `[B, T, HV, C]`.
        g: running sums of log-decays, base 2, `[B, T, HV]`.
    """
    B, T, H, K = k.shape
    HV, V = v.shape[2:]
    cut = Chunks.of(k, cu_seqlens, chunk_indices)
    w, u = k.new_empty(B, T, HV, K), torch.empty_like(v)
    writes_kernel[(cut.count * HV,)](
        k, v, beta, A, g, w, u, cu_seqlens, cut.indices, T,
        H=H, HV=HV, K=K, V=V, PIECES=pieces(K),
    )  # fmt: skip
    return w, u


def chunk_gated_delta_rule_fwd_h(
    k: Tensor,
    w: Tensor,
    u: Tensor,
    g: Tensor | None = None,
    gk: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    chunk_size: int = CHUNK,
    save_new_value: bool = True,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    chunk_indices: Tensor | None = None,
    chunk_offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the states before each chunk, V_new, and the final states; as fla 0.6.0's operator.

    Args:
        k: `[B, T, H, K]`; w: `[B, T, HV, K]`; u: `[B, T, HV, V]`; g: `[B, T, HV]`.
        gk: with a decay per key channel `[B, T, HV, K]`, and `k` decayed to the chunk's end.
        initial_state: `[N, HV, K, V]`, or with `state_v_first` `[N, HV, V, K]`, like all states.

    States are `[B, chunks, HV, K, V]` in the dtype of `k`, final ones float32.
    """
    B, T, H, K = k.shape
    HV, V = u.shape[2:]
    cut = Chunks.of(k, cu_seqlens, chunk_indices, chunk_offsets)
    shape = (V, K) if state_v_first else (K, V)
    states = k.new_empty(B, cut.a_row, HV, *shape)
    final = None
    if output_final_state:
        final = k.new_empty(cut.documents, HV, *shape, dtype=torch.float32)
    v_new = torch.empty_like(u) if save_new_value else None
    carry_states_kernel[lambda meta: (triton.cdiv(V, meta["BV"]) * cut.documents * HV,)](
        k, w, u, g, gk, initial_state, v_new, states, final, cu_seqlens, cut.offsets, T,
        H=H, HV=HV, K=K, V=V, PIECES=pieces(K), V_FIRST=state_v_first,
    )  # fmt: skip
    return states, v_new, final


def chunk_fwd_o(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    h: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = CHUNK,
    chunk_indices: Tensor | None = None,
) -> Tensor:
    """Return outputs `[B, T, HV, V]`; as fla 0.6.0's operator.

    Args:
        q, k: `[B, T, H, K]`; v: V_new, `[B, T, HV, V]`; g: `[B, T, HV]`.
        h: states before each chunk, `[B, chunks, HV, K, V]`, or V first with `state_v_first`.
    """
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    cut = Chunks.of(q, cu_seqlens, chunk_indices)
    out = torch.empty_like(v)
    outputs_kernel[lambda meta: (triton.cdiv(V, meta["BV"]) * cut.count * HV,)](
        q, k, v, h, g, out, cu_seqlens, cut.indices, K**-0.5 if scale is None else scale, T,
        H=H, HV=HV, K=K, V=V, PIECES=pieces(K), V_FIRST=state_v_first,
    )  # fmt: skip
    return out
