# mypy: ignore-errors
"""What the decode step's kernel computes of its vectors: convolutions, keys, decays and gates.

All compute in float32. A tuple holds a part for each of the powers of two, `PIECES`, into which a
head's key channels are split. `W` is the number of taps of a convolution.
"""

import triton
import triton.language as tl


@triton.jit
def convolved(x, window, weight, bias, channels, inside, W: tl.constexpr):
    """Return the convolution's output at `channels`, and the W tokens that it is made of."""
    taps = ()
    for tap in tl.static_range(1, W):
        held = tl.load(window + channels * W + tap, mask=inside, other=0)
        taps = taps + (held.to(tl.float32),)
    taps = taps + (tl.load(x + channels, mask=inside, other=0).to(tl.float32),)
    y = tl.zeros_like(taps[0])
    for tap in tl.static_range(W):
        y += taps[tap] * tl.load(weight + channels * W + tap, mask=inside, other=0).to(tl.float32)
    if bias is not None:
        y += tl.load(bias + channels, mask=inside, other=0).to(tl.float32)
    return y, taps


@triton.jit
def keep_window(window, taps, channels, inside, W: tl.constexpr):
    for tap in tl.static_range(W):
        places = window + channels * W + tap
        tl.store(places, taps[tap].to(window.dtype.element_ty), mask=inside)


@triton.jit
def silu(x):
    return x * tl.sigmoid(x)


@triton.jit
def head_vector(
    x, window, weight, bias, first, scale,
    W: tl.constexpr, PIECES: tl.constexpr, ACTIVATE: tl.constexpr,
):  # fmt: skip
    """Return a head's query or key, of length `scale`, and its windows, a piece each."""
    vectors = ()
    windows = ()
    square = 0.0
    for piece in tl.static_range(len(PIECES)):
        places = first + tl.arange(0, PIECES[piece])
        y, after = convolved(x, window, weight, bias, places, places >= 0, W)
        if ACTIVATE:
            y = silu(y)
        square += tl.sum(y * y)
        vectors = vectors + (y,)
        windows = windows + (after,)
        first += PIECES[piece]
    scale = scale / tl.sqrt(square + 1e-6)
    scaled = ()
    for piece in tl.static_range(len(PIECES)):
        scaled = scaled + (vectors[piece] * scale,)
    return scaled, windows


@triton.jit
def keep_windows(
    window, after, first, here,
    W: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    for piece in tl.static_range(len(PIECES)):
        places = first + tl.arange(0, PIECES[piece])
        keep_window(window, after[piece], places, (places >= 0) & here, W)
        first += PIECES[piece]


@triton.jit
def retained(decay, a_log, dt_bias, lower_bound, head, first, SIZE: tl.constexpr):
    """Return exp of the log-decays of a head, at the channels from `first`, or its only one."""
    places = head
    if SIZE > 0:
        places = first + tl.arange(0, SIZE)
    g = tl.load(decay + places).to(tl.float32)
    if a_log is not None:
        a = tl.exp(tl.load(a_log + head).to(tl.float32))
        if dt_bias is not None:
            g += tl.load(dt_bias + places).to(tl.float32)
        if lower_bound is not None:
            g = lower_bound * tl.sigmoid(a * g)
        else:
            g = -a * _softplus(g)
    return tl.exp(g)


@triton.jit
def _softplus(x):
    # log(1 + e) loses a small e: the quotient puts back what rounding 1 + e has taken.
    e = tl.exp(-tl.abs(x))
    wide = 1 + e
    lost = tl.where(wide == 1, 1.0, e / tl.where(wide == 1, 1.0, wide - 1))
    return tl.maximum(x, 0) + tl.where(wide == 1, e, tl.log(wide) * lost)


@triton.jit
def gated(x, gate, places, inside, GATE: tl.constexpr):
    """Return x times the output gate, if there is one: swish or sigmoid."""
    if gate is not None:
        g = tl.load(gate + places, mask=inside, other=0).to(tl.float32)
        x *= tl.sigmoid(g)
        if GATE == "swish":
            x *= g
    return x
