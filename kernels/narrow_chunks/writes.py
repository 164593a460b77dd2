# mypy: ignore-errors
"""`W = A diag(beta e^G) K` and `U = A diag(beta) V`, and what comes back through them.

`A = (I + L)^-1` with L the strict lower triangle of `diag(beta) K K^T * D`. With `R_W = A^T dW` and
`R_U = A^T dU`, dL is the strict lower triangle of `-A^T (dW (beta e^G K)^T + dU (beta V)^T) A^T`.
One program a chunk and head.
"""

import triton
import triton.language as tl

from kernels.narrow_chunks.pieces import tuned
from kernels.narrow_chunks.tiles import (
    C,
    head_of_chunk,
    load_rows,
    load_scalars,
    pair_decays,
    store_rows,
    store_scalars,
    tokens_of_chunk,
)

CONFIGS = [
    triton.Config({"BV": block}, num_warps=warps, num_stages=2)
    for block, warps in ((64, 4), (32, 4), (64, 8))
]


@tuned(CONFIGS, key=["HV", "K", "V"])
@triton.jit(do_not_specialize=["T"])
def writes_kernel(
    k,
    v,
    beta,
    A,
    g,
    w,
    u,
    cu_seqlens,
    chunk_indices,
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
    k += (first * H + i_head // (HV // H)) * K
    v += (first * HV + i_head) * V
    w += (first * HV + i_head) * K
    u += (first * HV + i_head) * V
    dtype = k.dtype.element_ty
    inverse = load_rows(A + (first * HV + i_head) * C, HV * C, left, 0, C, C).to(dtype)
    rate = load_scalars(beta + first * HV + i_head, HV, left)
    for first_value in range(0, V, BV):
        value = load_rows(v, HV * V, left, first_value, BV, V).to(tl.float32) * rate[:, None]
        value = tl.dot(inverse, value.to(dtype), input_precision="ieee")
        store_rows(u, value, HV * V, left, first_value, BV, V)
    if g is not None:
        rate *= tl.exp2(load_scalars(g + first * HV + i_head, HV, left))
    for p in tl.static_range(len(PIECES)):
        keys = load_rows(k, H * K, left, PIECES[p][0], PIECES[p][1], K).to(tl.float32)
        keys = tl.dot(inverse, (keys * rate[:, None]).to(dtype))
        store_rows(w, keys, HV * K, left, PIECES[p][0], PIECES[p][1], K)


@tuned(CONFIGS, key=["HV", "K", "V"])
@triton.jit(do_not_specialize=["T"])
def write_gradients_kernel(
    k,
    v,
    beta,
    g,
    A,
    dw,
    du,
    dk,
    dv,
    dbeta,
    dg,
    cu_seqlens,
    chunk_indices,
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
    k += (first * H + i_head // (HV // H)) * K
    dk += (first * HV + i_head) * K
    dw += (first * HV + i_head) * K
    v += (first * HV + i_head) * V
    dv += (first * HV + i_head) * V
    du += (first * HV + i_head) * V
    dtype = k.dtype.element_ty
    turned = tl.trans(load_rows(A + (first * HV + i_head) * C, HV * C, left, 0, C, C)).to(dtype)
    rate = load_scalars(beta + first * HV + i_head, HV, left)
    decayed_rate = rate
    decay = 1.0
    if g is not None:
        g += first * HV + i_head
        decay = tl.exp2(load_scalars(g, HV, left))
        decayed_rate = rate * decay
    dinverse = tl.zeros([C, C], tl.float32)
    drate = tl.zeros([C], tl.float32)
    dtotal = tl.zeros([C], tl.float32)

    for first_value in range(0, V, BV):
        value = load_rows(v, HV * V, left, first_value, BV, V).to(tl.float32)
        dwritten = load_rows(du, HV * V, left, first_value, BV, V)
        dinverse = tl.dot(dwritten, tl.trans((value * rate[:, None]).to(dtype)), dinverse)
        dright = tl.dot(turned, dwritten)
        drate += tl.sum(dright * value, 1)
        store_rows(dv, dright * rate[:, None], HV * V, left, first_value, BV, V)
    through_w = ()
    for p in tl.static_range(len(PIECES)):
        keys = load_rows(k, H * K, left, PIECES[p][0], PIECES[p][1], K).to(tl.float32)
        dwritten = load_rows(dw, HV * K, left, PIECES[p][0], PIECES[p][1], K)
        dinverse = tl.dot(dwritten, tl.trans((keys * decayed_rate[:, None]).to(dtype)), dinverse)
        dright = tl.dot(turned, dwritten)
        along = tl.sum(dright * keys, 1)
        drate += along * decay
        dtotal += along * decayed_rate
        through_w = through_w + (dright * decayed_rate[:, None],)

    rows = tl.arange(0, C)
    strict = (rows[:, None] > rows[None, :]) & (rows < left)[:, None]
    dinverse = tl.where(strict, dinverse, 0.0).to(dtype)
    dsystem = tl.dot(turned, tl.dot(dinverse, turned).to(dtype))
    dsystem = (-dsystem * pair_decays(g, HV, left, True)).to(dtype)
    products = tl.zeros([C, C], tl.float32)
    for p in tl.static_range(len(PIECES)):
        keys = load_rows(k, H * K, left, PIECES[p][0], PIECES[p][1], K)
        wide = keys.to(tl.float32)
        if g is not None:
            products = tl.dot(keys, tl.trans(keys), products)
        dleft = tl.dot(dsystem, keys)
        drate += tl.sum(dleft * wide, 1)
        dkey = through_w[p] + dleft * rate[:, None]
        # Not trans(dsystem) @ ...: Triton turns a product in registers wrongly on Hopper.
        dkey += tl.trans(tl.dot(tl.trans((wide * rate[:, None]).to(dtype)), dsystem))
        store_rows(dk, dkey, HV * K, left, PIECES[p][0], PIECES[p][1], K)
    store_scalars(dbeta + first * HV + i_head, drate, HV, left)
    if g is not None:
        pairs = dsystem.to(tl.float32) * products * rate[:, None]
        dtotal += tl.sum(pairs, 1) - tl.sum(pairs, 0)
        store_scalars(dg + first * HV + i_head, dtotal, HV, left)
