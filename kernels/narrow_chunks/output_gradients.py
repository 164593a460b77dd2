# mypy: ignore-errors
"""Gradients of the outputs of all chunks at once; one program a chunk and head.

With `P = (dO V_new^T * D) scale`, S the state before a chunk and dS the gradient of that after it:

    dV_new = (scale Q K^T * D)^T dO                       (the part from the chunk's own outputs)
    dQ = scale e^{G_i} dO S^T + P K,     dK = e^{G - G_i} V_new dS^T + P^T Q,     dW = -dV_new S^T

Every logarithm of a decay has as its gradient what it multiplies times that one's gradient, so that
of `G_i` is `dQ_i . Q_i - dK_i . K_i`, and the chunk's last token has what concerns `G` itself.
"""

import triton
import triton.language as tl

from kernels.narrow_chunks.pieces import tuned
from kernels.narrow_chunks.tiles import (
    C,
    head_of_chunk,
    last_decay,
    load_rows,
    load_scalars,
    load_state,
    pair_decays,
    store_rows,
    store_scalars,
    tokens_of_chunk,
    zero_rows,
)

CONFIGS = [
    triton.Config({"BV": block}, num_warps=warps, num_stages=stages)
    for block, warps, stages in ((64, 4, 2), (32, 4, 2), (64, 8, 2), (32, 2, 3))
]


@tuned(CONFIGS, key=["HV", "K", "V"])
@triton.jit(do_not_specialize=["T"])
def own_value_gradients_kernel(
    q,
    k,
    g,
    dout,
    dv,
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
):
    _, i_head, i_chunk = head_of_chunk(HV, 1)
    first, left = tokens_of_chunk(i_chunk, T, cu_seqlens, chunk_indices)
    q += (first * H + i_head // (HV // H)) * K
    k += (first * H + i_head // (HV // H)) * K
    dout += (first * HV + i_head) * V
    dv += (first * HV + i_head) * V
    if g is not None:
        g += first * HV + i_head
    turned = tl.zeros([C, C], tl.float32)
    for p in tl.static_range(len(PIECES)):
        queries = load_rows(q, H * K, left, PIECES[p][0], PIECES[p][1], K)
        keys = load_rows(k, H * K, left, PIECES[p][0], PIECES[p][1], K)
        turned = tl.dot(keys, tl.trans(queries), turned)
    # Made turned: Triton up to 3.7.0 multiplies wrongly by a product that is turned in registers.
    turned *= tl.trans(pair_decays(g, HV, left, False)) * scale
    turned = turned.to(dout.dtype.element_ty)
    for first_value in range(0, V, BV):
        part = tl.dot(turned, load_rows(dout, HV * V, left, first_value, BV, V))
        store_rows(dv, part, HV * V, left, first_value, BV, V)


@tuned(CONFIGS, key=["HV", "K", "V", "V_FIRST"])
@triton.jit(do_not_specialize=["T"])
def output_gradients_kernel(
    q,
    k,
    v_new,
    g,
    states,
    dout,
    dstates,
    dv_new,
    dq,
    dk,
    dw,
    dg,
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
    _, i_head, i_chunk = head_of_chunk(HV, 1)
    first, left = tokens_of_chunk(i_chunk, T, cu_seqlens, chunk_indices)
    q += (first * H + i_head // (HV // H)) * K
    k += (first * H + i_head // (HV // H)) * K
    dq += (first * HV + i_head) * K
    dk += (first * HV + i_head) * K
    dw += (first * HV + i_head) * K
    v_new += (first * HV + i_head) * V
    dv_new += (first * HV + i_head) * V
    dout += (first * HV + i_head) * V
    states += (i_chunk * HV + i_head) * K * V
    dstates += (i_chunk * HV + i_head) * K * V
    dtype = q.dtype.element_ty
    dscores = tl.zeros([C, C], tl.float32)
    if g is not None:
        g += first * HV + i_head
        last, total = last_decay(g, HV, left), load_scalars(g, HV, left)
        decay_to_end = tl.exp2(last - total)
    dtotal = tl.zeros([C], tl.float32)
    dlast = 0.0
    along_states = 0.0
    # Piece by piece, so that three accumulators live at a time and not three of all K channels;
    # the rows of values are read again for each, from the cache.
    for p in tl.static_range(len(PIECES)):
        dquery = zero_rows(PIECES[p][1])
        dkey = zero_rows(PIECES[p][1])
        dwrite = zero_rows(PIECES[p][1])
        for first_value in range(0, V, BV):
            value = load_rows(v_new, HV * V, left, first_value, BV, V)
            dvalue = load_rows(dv_new, HV * V, left, first_value, BV, V)
            dread = load_rows(dout, HV * V, left, first_value, BV, V)
            state = load_state(states, PIECES[p][0], first_value, PIECES[p][1], BV, K, V, V_FIRST)
            dstate = load_state(dstates, PIECES[p][0], first_value, PIECES[p][1], BV, K, V, V_FIRST)
            if g is not None:
                along_states += tl.sum(state.to(tl.float32) * dstate.to(tl.float32))
            if p == 0:
                dscores = tl.dot(dread, tl.trans(value), dscores)
            dquery = tl.dot(dread, tl.trans(state), dquery)
            dkey = tl.dot(value, tl.trans(dstate), dkey)
            dwrite = tl.dot(dvalue, tl.trans(state), dwrite)
        store_rows(dw, -dwrite, HV * K, left, PIECES[p][0], PIECES[p][1], K)
        if p == 0:
            weights = (dscores * pair_decays(g, HV, left, False) * scale).to(dtype)
        queries = load_rows(q, H * K, left, PIECES[p][0], PIECES[p][1], K)
        keys = load_rows(k, H * K, left, PIECES[p][0], PIECES[p][1], K)
        dquery *= scale
        if g is not None:
            dquery *= tl.exp2(total)[:, None]
            dkey *= decay_to_end[:, None]
            dlast += tl.sum(dkey * keys.to(tl.float32))
        dquery = tl.dot(weights, keys, dquery)
        # Not trans(weights) @ queries: Triton up to 3.7.0 turns a product in registers wrongly.
        dkey += tl.trans(tl.dot(tl.trans(queries), weights))
        if g is not None:
            dtotal += tl.sum(dquery * queries.to(tl.float32), 1)
            dtotal -= tl.sum(dkey * keys.to(tl.float32), 1)
        store_rows(dq, dquery, HV * K, left, PIECES[p][0], PIECES[p][1], K)
        store_rows(dk, dkey, HV * K, left, PIECES[p][0], PIECES[p][1], K)
    if g is not None:
        is_last = tl.arange(0, C) == tl.minimum(left, C) - 1
        dtotal += tl.where(is_last, dlast + along_states * tl.exp2(last), 0.0)
        store_scalars(dg + first * HV + i_head, dtotal, HV, left)
