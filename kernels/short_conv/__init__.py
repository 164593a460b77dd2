"""Depthwise causal convolution of width W (4 in practice) as W shifted products.

Packed documents, rows of a batch and cached states are one case: tokens are copied into one stream
with W - 1 rows before every document, which hold zeros or the end of its cached state. Then the
convolution runs over the whole stream without a mask.

The functions have the signatures of fla 0.6.0's kernels. There are D channels and N documents;
states `[N, D, W]` hold the last W inputs, oldest first.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from kernels.gated_delta_rule.chunk import wide_dtype

__all__ = ["causal_conv1d_bwd", "causal_conv1d_fwd", "causal_conv1d_states", "causal_conv1d_update"]

_SILU = ("silu", "swish")


class _Stream(NamedTuple):
    """Where tokens and states lie in the padded stream."""

    token: Int64[Tensor, " tokens"]
    """The row of each token."""
    before: Int64[Tensor, "N W-1"]
    """The rows before each document."""
    rows: int
    """Rows of the stream."""
    last: Int64[Tensor, "N W-1"]
    """The last W - 1 rows of each document, states included."""


def causal_conv1d_fwd(
    x: Float[Tensor, "B T D"],
    weight: Float[Tensor, "D W"],
    bias: Tensor | None,
    residual: Tensor | None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    activation: str | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    **_: Any,
) -> tuple[Float[Tensor, "B T D"], Tensor | None]:
    """Return the outputs, and the final states if `output_final_state`, else None."""
    shape, x = x.shape, _channels_last(x, weight)
    stream = _layout(x, weight, cu_seqlens)
    y = _convolve(_fill(x, initial_state, stream), weight, bias, stream)
    y = F.silu(y, inplace=True) if activation in _SILU else y
    y = y.view(shape)
    if residual is not None:
        y = y + residual
    final = None
    if output_final_state:
        final = causal_conv1d_states(x, weight.shape[1], initial_state, cu_seqlens)
    return y.to(x.dtype), final


def causal_conv1d_bwd(
    x: Float[Tensor, "B T D"],
    dy: Float[Tensor, "B T D"],
    dht: Tensor | None,
    weight: Float[Tensor, "D W"],
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    initial_state: Tensor | None = None,
    activation: str | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x, weight, bias, residual and initial state."""
    shape, x = x.shape, _channels_last(x, weight)
    stream = _layout(x, weight, cu_seqlens)
    padded = _fill(x, initial_state, stream)
    flat = dy.reshape(-1, weight.shape[0]).to(padded.dtype)
    if activation in _SILU:
        flat = torch.ops.aten.silu_backward(flat, _convolve(padded, weight, bias, stream))
    # W - 1 zero rows end the gradient's stream, since the reversed convolution reads past its end.
    width = weight.shape[1]
    grad = flat.new_zeros(stream.rows + width - 1, flat.shape[1]).index_copy_(0, stream.token, flat)
    dpadded, dweight = _transposed(grad, padded, weight)
    if dht is not None:
        _add_state_gradient(dpadded, dht, stream)
    dx = dpadded.index_select(0, stream.token).view(shape).to(x.dtype)
    db = None if bias is None else flat.sum(0).to(bias.dtype)
    dh0 = None if initial_state is None else _state_gradient(dpadded, initial_state, stream)
    return dx, dweight.to(weight.dtype), db, dy if residual is not None else None, dh0


def causal_conv1d_states(
    x: Float[Tensor, "B T D"],
    state_len: int,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Float[Tensor, "N D W"]:
    """Return the last `state_len` inputs of each document, initial state included."""
    x = x.unsqueeze(0) if x.ndim == 2 else x
    stream = _stream(_lengths(x, cu_seqlens), state_len + 1, x.device)
    padded = _place(x, initial_state, stream)
    return padded[stream.last].transpose(1, 2).contiguous()


def causal_conv1d_update(
    x: Tensor,
    cache: Float[Tensor, "N D W"],
    residual: Tensor | None = None,
    weight: Float[Tensor, "D W"] | None = None,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> tuple[Tensor, Float[Tensor, "N D W"]]:
    """Push one token of each document into `cache`, in place; return its output and the cache."""
    assert weight is not None, "a convolution needs its weight"
    token = x.reshape(-1, weight.shape[0])
    cache.copy_(torch.cat([cache[..., 1:], token.unsqueeze(-1).to(cache.dtype)], -1))
    y = (cache * weight).sum(-1)
    y = y if bias is None else y + bias
    y = (F.silu(y) if activation in _SILU else y).view(x.shape).to(x.dtype)
    return (y if residual is None else y + residual), cache


def _convolve(
    padded: Float[Tensor, "rows D"],
    weight: Float[Tensor, "D W"],
    bias: Tensor | None,
    stream: _Stream,
) -> Float[Tensor, "tokens D"]:
    width = weight.shape[1]
    taps = weight.to(padded.dtype).t().contiguous()
    span = stream.rows - width + 1
    y = padded[:span] * taps[0]
    for shift in range(1, width):
        y.addcmul_(padded[shift : shift + span], taps[shift])
    y = y.index_select(0, stream.token - (width - 1))
    return y if bias is None else y + bias


def _transposed(
    grad: Float[Tensor, "rows+W-1 D"], padded: Float[Tensor, "rows D"], weight: Tensor
) -> tuple[Float[Tensor, "rows D"], Float[Tensor, "D W"]]:
    width, rows = weight.shape[1], len(padded)
    taps = weight.to(padded.dtype).t().contiguous()
    dpadded = grad[width - 1 :] * taps[0]
    for shift in range(1, width):
        dpadded.addcmul_(grad[width - 1 - shift : width - 1 - shift + rows], taps[shift])
    dweight = [
        (grad[width - 1 : rows] * padded[shift : shift + rows - width + 1]).sum(0)
        for shift in range(width)
    ]
    return dpadded, torch.stack(dweight, 1)


def _fill(
    x: Float[Tensor, "B T D"], initial_state: Tensor | None, stream: _Stream
) -> Float[Tensor, "rows D"]:
    return _place(x.to(wide_dtype(x)), initial_state, stream)


def _place(x: Tensor, initial_state: Tensor | None, stream: _Stream) -> Float[Tensor, "rows D"]:
    flat = x.reshape(-1, x.shape[-1])
    padded = flat.new_empty(stream.rows, flat.shape[1])
    padded.index_copy_(0, stream.token, flat)
    width = stream.before.shape[1]
    if initial_state is None:
        padded.index_fill_(0, stream.before.flatten(), 0)
    elif width:
        kept = initial_state[..., -width:].transpose(1, 2).to(padded.dtype)
        padded.index_copy_(0, stream.before.flatten(), kept.reshape(-1, flat.shape[1]))
    return padded


def _state_gradient(
    dpadded: Tensor, initial_state: Tensor, stream: _Stream
) -> Float[Tensor, "N D W"]:
    dh0 = torch.zeros_like(initial_state)
    width = stream.before.shape[1]
    dh0[..., -width:] = dpadded[stream.before].transpose(1, 2).to(dh0.dtype)
    return dh0


def _add_state_gradient(dpadded: Tensor, dht: Tensor, stream: _Stream) -> None:
    width = stream.last.shape[1]
    grad = dht[..., -width:].transpose(1, 2).reshape(-1, dpadded.shape[1])
    dpadded.index_add_(0, stream.last.flatten(), grad.to(dpadded.dtype))


def _channels_last(x: Tensor, weight: Tensor) -> Float[Tensor, "B T D"]:
    return x if x.shape[-1] == weight.shape[0] else x.flatten(2)


def _lengths(x: Tensor, cu_seqlens: Tensor | None) -> tuple[int, ...]:
    if cu_seqlens is None:
        return (x.shape[1],) * x.shape[0]
    return tuple(cu_seqlens.diff().tolist())


def _layout(x: Tensor, weight: Tensor, cu_seqlens: Tensor | None) -> _Stream:
    return _stream(_lengths(x, cu_seqlens), weight.shape[1], x.device)


# The cache outlives a caller's inference mode, whose tensors autograd would refuse later.
@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _stream(lengths: tuple[int, ...], width: int, device: torch.device) -> _Stream:
    """Lay out documents of these lengths, each behind `width - 1` rows of state."""
    pad = width - 1
    total = torch.tensor(lengths, dtype=torch.int64)
    end = (total + pad).cumsum(0)
    start = end - total - pad
    document = torch.repeat_interleave(torch.arange(len(lengths)), total)
    token = torch.arange(int(total.sum())) + (document + 1) * pad
    before = start[:, None] + torch.arange(pad)
    last = end[:, None] - pad + torch.arange(pad)
    rows = int(end[-1]) if len(lengths) else 0
    return _Stream(token.to(device), before.to(device), rows, last.to(device))
