# mypy: ignore-errors
"""The Triton kernel of a decode step: all that a layer does between its projections, in one launch.

A program has one row and one key head, with the G value heads that share it: the programs of a
group would otherwise race for the convolution windows of its query and key, which are updated in
place. Key channels are split into powers of two, `PIECES`, so that 96 are 64 and 32 and not 128; a
tuple holds a vector or a tile for each piece. Value channels are taken `BV` at a time, NV times.
"""

import triton
import triton.language as tl

from kernels.decode_step.kernel_vectors import (
    convolved,
    gated,
    head_vector,
    keep_window,
    keep_windows,
    retained,
    silu,
)


@triton.jit
def _tile(
    step, V: tl.constexpr, BV: tl.constexpr, NV: tl.constexpr,
    K: tl.constexpr, V_STRIDE: tl.constexpr,
):  # fmt: skip
    """Return where the rows of a tile of the state begin in a group's states, and which exist."""
    values = (step % NV) * BV + tl.arange(0, BV)
    return (step // NV) * (K * V) + values * V_STRIDE, values < V


@triton.jit
def _load_tile(state, rows, inside, K_STRIDE: tl.constexpr, PIECES: tl.constexpr):
    tiles = ()
    first = 0
    for piece in tl.static_range(len(PIECES)):
        keys = first + tl.arange(0, PIECES[piece])
        places = state + rows[:, None] + keys[None, :] * K_STRIDE
        tiles = tiles + (tl.load(places, mask=inside[:, None], other=0),)
        first += PIECES[piece]
    return tiles


@triton.jit
def _updated(
    tiles, query, key, value, rate, decay, a_log, dt_bias, lower_bound, head,
    K: tl.constexpr, PIECES: tl.constexpr, CHANNEL_DECAY: tl.constexpr,
):  # fmt: skip
    """Return a tile of the state after this token, and what the query reads from it."""
    kept = ()
    first = head * K
    for piece in tl.static_range(len(PIECES)):
        tile = tiles[piece].to(tl.float32)
        if decay is not None:
            if CHANNEL_DECAY:
                factor = retained(decay, a_log, dt_bias, lower_bound, head, first, PIECES[piece])
                tile *= factor[None, :]
            else:
                tile *= retained(decay, a_log, dt_bias, lower_bound, head, first, 0)
        value -= tl.sum(tile * key[piece][None, :], 1)
        kept = kept + (tile,)
        first += PIECES[piece]
    change = rate * value
    after = ()
    read = tl.zeros_like(change)
    for piece in tl.static_range(len(PIECES)):
        tile = kept[piece] + change[:, None] * key[piece][None, :]
        read += tl.sum(tile * query[piece][None, :], 1)
        after = after + (tile,)
    return after, read


@triton.jit
def _store_tile(state, tiles, rows, inside, K_STRIDE: tl.constexpr, PIECES: tl.constexpr):
    first = 0
    for piece in tl.static_range(len(PIECES)):
        keys = first + tl.arange(0, PIECES[piece])
        places = state + rows[:, None] + keys[None, :] * K_STRIDE
        tl.store(places, tiles[piece].to(state.dtype.element_ty), mask=inside[:, None])
        first += PIECES[piece]


@triton.jit
def decode_step_kernel(
    q, k, v, decay, beta, gate, real,
    q_window, k_window, v_window, q_weight, k_weight, v_weight, q_bias, k_bias, v_bias,
    a_log, dt_bias, norm_weight, state, out,
    scale, eps, lower_bound, real_stride,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, W: tl.constexpr,
    PIECES: tl.constexpr, BV: tl.constexpr, NV: tl.constexpr, NV_POWER: tl.constexpr,
    STATE_V_FIRST: tl.constexpr, CHANNEL_DECAY: tl.constexpr, ACTIVATE_QK: tl.constexpr,
    BETA_SCALE: tl.constexpr, GATE: tl.constexpr, CROWD: tl.constexpr,
):  # fmt: skip
    """Write the normed, gated output of a token, and in place the state and windows after it."""
    program = tl.program_id(0)
    row, head = (program // H).to(tl.int64), program % H
    K_STRIDE: tl.constexpr = 1 if STATE_V_FIRST else V
    V_STRIDE: tl.constexpr = K if STATE_V_FIRST else 1
    # Pointers move to this row; places inside a row are int32.
    q += row * (H * K)
    k += row * (H * K)
    v += row * (H * G * V)
    q_window += row * (H * K * W)
    k_window += row * (H * K * W)
    v_window += row * (H * G * V * W)
    state += (row * H + head) * (G * K * V)
    out += row * (H * G * V)
    if decay is not None:
        decay += row * (H * G * (K if CHANNEL_DECAY else 1))
    if beta is not None:
        beta += row * (H * G)
    if gate is not None:
        gate += row * (H * G * V)
    here = tl.full([], 1, tl.int1)
    if real is not None:
        here = here & (tl.load(real + row * real_stride) != 0)

    # A tile is asked for a step before it is used, the first before anything else is done.
    rows, inside = _tile(0, V, BV, NV, K, V_STRIDE)
    tiles = _load_tile(state, rows, inside, K_STRIDE, PIECES)
    query, q_taps = head_vector(
        q, q_window, q_weight, q_bias, head * K, scale, W, PIECES, ACTIVATE_QK
    )
    key, k_taps = head_vector(k, k_window, k_weight, k_bias, head * K, 1.0, W, PIECES, ACTIVATE_QK)
    # Every thread has read the windows before one is written.
    tl.debug_barrier()
    keep_windows(q_window, q_taps, head * K, here, W, PIECES)
    keep_windows(k_window, k_taps, head * K, here, W, PIECES)

    tile_of = tl.arange(0, NV_POWER)[:, None]
    channels_of = tile_of * BV + tl.arange(0, BV)[None, :]
    outputs = tl.zeros([NV_POWER, BV], dtype=tl.float32)
    for step in range(G * NV):
        value_head = head * G + step // NV
        tile = step % NV
        next_rows, next_inside = _tile(step + 1, V, BV, NV, K, V_STRIDE)
        more = next_inside & (step + 1 < G * NV)
        next_tiles = _load_tile(state, next_rows, more, K_STRIDE, PIECES)

        channels = value_head * V + tile * BV + tl.arange(0, BV)
        value, v_taps = convolved(v, v_window, v_weight, v_bias, channels, inside, W)
        tl.debug_barrier()
        keep_window(v_window, v_taps, channels, inside & here, W)
        rate = BETA_SCALE
        if beta is not None:
            rate = BETA_SCALE * tl.sigmoid(tl.load(beta + value_head).to(tl.float32))
        after, read = _updated(
            tiles, query, key, silu(value), rate, decay, a_log, dt_bias, lower_bound, value_head,
            K, PIECES, CHANNEL_DECAY,
        )  # fmt: skip
        _store_tile(state, after, rows, inside & here, K_STRIDE, PIECES)
        outputs = tl.where(tile_of == tile, read[None, :], outputs)

        if tile == NV - 1:
            known = channels_of < V
            y = outputs / tl.sqrt(tl.sum(tl.sum(outputs * outputs, 1), 0) / V + eps)
            if norm_weight is not None:
                y *= tl.load(norm_weight + channels_of, mask=known, other=0).to(tl.float32)
            places = value_head * V + channels_of
            y = tl.where(here, gated(y, gate, places, known, GATE), 0)
            tl.store(out + places, y.to(out.dtype.element_ty), mask=known)
        rows, inside, tiles = next_rows, next_inside, next_tiles
