# mypy: ignore-errors
"""The outputs of all chunks at once: `O = scale (e^{G_i} Q S + (Q K^T * D) V_new)`.

One program a chunk, head and block of value channels.
"""

import triton
import triton.language as tl

from kernels.narrow_chunks.pieces import tuned
from kernels.narrow_chunks.tiles import (
    C,
    head_of_chunk,
    load_rows,
    load_scalars,
    load_state,
    pair_decays,
    store_rows,
    tokens_of_chunk,
)

CONFIGS = [
    triton.Config({"BV": block}, num_warps=warps, num_stages=2)
    for block, warps in ((64, 4), (128, 4), (128, 8), (32, 2))
]


@tuned(CONFIGS, key=["HV", "K", "V", "V_FIRST"])
@triton.jit(do_not_specialize=["T"])
def outputs_kernel(
    q,
    k,
    v_new,
    states,
    g,
    out,
    cu_seqlens,
    chunk_indices,
    scale,
    T,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BV: tl.constexpr,
    PIECES: tl.constexpr,
    V_FIRST: tl.constexpr,
):
    part, i_head, i_chunk = head_of_chunk(HV, tl.cdiv(V, BV))
    first, left = tokens_of_chunk(i_chunk, T, cu_seqlens, chunk_indices)
    first_value = part * BV
    q += (first * H + i_head // (HV // H)) * K
    k += (first * H + i_head // (HV // H)) * K
    states += (i_chunk * HV + i_head) * K * V
    read = tl.zeros([C, BV], tl.float32)
    scores = tl.zeros([C, C], tl.float32)
    for p in tl.static_range(len(PIECES)):
        queries = load_rows(q, H * K, left, PIECES[p][0], PIECES[p][1], K)
        keys = load_rows(k, H * K, left, PIECES[p][0], PIECES[p][1], K)
        state = load_state(states, PIECES[p][0], first_value, PIECES[p][1], BV, K, V, V_FIRST)
        read = tl.dot(queries, state.to(queries.dtype), read)
        scores = tl.dot(queries, tl.trans(keys), scores)
    if g is not None:
        g += first * HV + i_head
        read *= tl.exp2(load_scalars(g, HV, left))[:, None]
    scores *= pair_decays(g, HV, left, False)
    value = load_rows(v_new + (first * HV + i_head) * V, HV * V, left, first_value, BV, V)
    read = tl.dot(scores.to(value.dtype), value, read) * scale
    store_rows(out + (first * HV + i_head) * V, read, HV * V, left, first_value, BV, V)
