# mypy: ignore-errors
"""The gradient of the state from chunk to chunk, last to first.

    dV_new += e^{G - G_i} K dS,     dS <- e^G dS + (scale e^{G_i} Q)^T dO - W^T dV_new

With a decay per key channel, `gk`, the caller has decayed Q and K already. One program a head and
block of value channels. `kernels.gated_delta_rule.recurrence` is the same in PyTorch.
"""

import triton
import triton.language as tl

from kernels.narrow_chunks.pieces import tuned
from kernels.narrow_chunks.states import CONFIGS
from kernels.narrow_chunks.tiles import (
    C,
    channel_decays,
    last_decay,
    load_rows,
    load_scalars,
    load_state,
    store_rows,
    store_state,
    tokens_of_document,
)


@tuned(CONFIGS, key=["HV", "K", "V", "V_FIRST"])
@triton.jit(do_not_specialize=["T"])
def carry_gradients_kernel(
    q,
    k,
    w,
    g,
    gk,
    dfinal,
    dinitial,
    dout,
    dstates,
    dv,
    dv_new,
    cu_seqlens,
    chunk_offsets,
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
    program = tl.program_id(0).to(tl.int64)
    first_value = program % tl.cdiv(V, BV) * BV
    i_state = program // tl.cdiv(V, BV)
    i_head = i_state % HV
    first, tokens, chunk = tokens_of_document(i_state // HV, T, cu_seqlens, chunk_offsets)
    chunks = tl.cdiv(tokens, C)
    # The last chunk; every step goes one back.
    start = (chunks - 1) * C
    first += start
    q += (first * H + i_head // (HV // H)) * K
    k += (first * H + i_head // (HV // H)) * K
    w += (first * HV + i_head) * K
    dout += (first * HV + i_head) * V
    dv += (first * HV + i_head) * V
    dv_new += (first * HV + i_head) * V
    dstates += ((chunk + chunks - 1) * HV + i_head) * K * V
    if g is not None:
        g += first * HV + i_head
    if gk is not None:
        gk += (first * HV + i_head) * K
    if dfinal is not None:
        dfinal += i_state * K * V
    if dinitial is not None:
        dinitial += i_state * K * V
    dtype = k.dtype.element_ty

    dstate = ()
    for p in tl.static_range(len(PIECES)):
        begin = load_state(dfinal, PIECES[p][0], first_value, PIECES[p][1], BV, K, V, V_FIRST)
        dstate = dstate + (begin.to(tl.float32),)

    for _ in range(0, chunks):
        left = tokens - start
        dvalue = tl.zeros([C, BV], tl.float32)
        for p in tl.static_range(len(PIECES)):
            part = dstate[p].to(dtype)
            store_state(dstates, part, PIECES[p][0], first_value, PIECES[p][1], BV, K, V, V_FIRST)
            keys = load_rows(k, H * K, left, PIECES[p][0], PIECES[p][1], K)
            dvalue = tl.dot(keys, part, dvalue)
        read = load_rows(dout, HV * V, left, first_value, BV, V).to(tl.float32) * scale
        if g is not None:
            last, total = last_decay(g, HV, left), load_scalars(g, HV, left)
            dvalue *= tl.exp2(last - total)[:, None]
            read *= tl.exp2(total)[:, None]
            kept = tl.exp2(last)
            g -= C * HV
        dvalue += load_rows(dv, HV * V, left, first_value, BV, V).to(tl.float32)
        store_rows(dv_new, dvalue, HV * V, left, first_value, BV, V)
        read, change = read.to(dtype), (-dvalue).to(dtype)
        before = ()
        for p in tl.static_range(len(PIECES)):
            part = dstate[p]
            if g is not None:
                part *= kept
            if gk is not None:
                part *= channel_decays(gk, HV * K, left, PIECES[p][0], PIECES[p][1])
            queries = load_rows(q, H * K, left, PIECES[p][0], PIECES[p][1], K)
            part = tl.dot(tl.trans(queries), read, part)
            keys = load_rows(w, HV * K, left, PIECES[p][0], PIECES[p][1], K)
            before = before + (tl.dot(tl.trans(keys), change, part),)
        dstate = before
        if gk is not None:
            gk -= C * HV * K
        start -= C
        q -= C * H * K
        k -= C * H * K
        w -= C * HV * K
        dout -= C * HV * V
        dv -= C * HV * V
        dv_new -= C * HV * V
        dstates -= HV * K * V

    if dinitial is not None:
        for p in tl.static_range(len(PIECES)):
            store_state(
                dinitial, dstate[p], PIECES[p][0], first_value, PIECES[p][1], BV, K, V, V_FIRST
            )
