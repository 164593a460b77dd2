# mypy: ignore-errors
"""The state from chunk to chunk: one program a head and block of value channels.

    V_new = U - W S,     S <- e^G S + (e^{G - G_i} K)^T V_new

With a decay per key channel, `gk`, the caller has decayed the keys already.

`kernels/README.md` derives it; `kernels.gated_delta_rule.recurrence` is the same in PyTorch.
"""

import triton
import triton.language as tl

from kernels.narrow_chunks.pieces import tuned
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

CONFIGS = [
    triton.Config({"BV": block}, num_warps=warps, num_stages=stages)
    for block, warps, stages in ((64, 4, 2), (32, 4, 2), (32, 2, 2), (64, 4, 3))
]


@tuned(CONFIGS, key=["HV", "K", "V", "V_FIRST"])
@triton.jit(do_not_specialize=["T"])
def carry_states_kernel(
    k,
    w,
    u,
    g,
    gk,
    initial,
    v_new,
    states,
    final,
    cu_seqlens,
    chunk_offsets,
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
    k += (first * H + i_head // (HV // H)) * K
    w += (first * HV + i_head) * K
    u += (first * HV + i_head) * V
    states += (chunk * HV + i_head) * K * V
    if v_new is not None:
        v_new += (first * HV + i_head) * V
    if g is not None:
        g += first * HV + i_head
    if gk is not None:
        gk += (first * HV + i_head) * K
    if initial is not None:
        initial += i_state * K * V
    if final is not None:
        final += i_state * K * V
    dtype = k.dtype.element_ty

    state = ()
    for p in tl.static_range(len(PIECES)):
        begin = load_state(initial, PIECES[p][0], first_value, PIECES[p][1], BV, K, V, V_FIRST)
        state = state + (begin.to(tl.float32),)

    for start in range(0, tokens, C):
        left = tokens - start
        read = tl.zeros([C, BV], tl.float32)
        for p in tl.static_range(len(PIECES)):
            part = state[p].to(dtype)
            store_state(states, part, PIECES[p][0], first_value, PIECES[p][1], BV, K, V, V_FIRST)
            keys = load_rows(w, HV * K, left, PIECES[p][0], PIECES[p][1], K)
            read = tl.dot(keys, part, read)
        value = load_rows(u, HV * V, left, first_value, BV, V).to(tl.float32) - read
        if v_new is not None:
            store_rows(v_new, value, HV * V, left, first_value, BV, V)
            v_new += C * HV * V
        if g is not None:
            last = last_decay(g, HV, left)
            value *= tl.exp2(last - load_scalars(g, HV, left))[:, None]
            kept = tl.exp2(last)
            g += C * HV
        value = value.to(dtype)
        after = ()
        for p in tl.static_range(len(PIECES)):
            keys = load_rows(k, H * K, left, PIECES[p][0], PIECES[p][1], K)
            part = state[p]
            if g is not None:
                part *= kept
            if gk is not None:
                part *= channel_decays(gk, HV * K, left, PIECES[p][0], PIECES[p][1])
            after = after + (tl.dot(tl.trans(keys), value, part),)
        state = after
        if gk is not None:
            gk += C * HV * K
        k += C * H * K
        w += C * HV * K
        u += C * HV * V
        states += HV * K * V

    if final is not None:
        for p in tl.static_range(len(PIECES)):
            store_state(final, state[p], PIECES[p][0], first_value, PIECES[p][1], BV, K, V, V_FIRST)
