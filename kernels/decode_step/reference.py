"""The decode step in plain PyTorch, in float64 if its tensors are, else in float32."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from kernels.decode_step.step import Convolution, Decay, DecodeStep, Output

EPS = 1e-6
"""Added to the squared length of a query or key before its root, as in fla's L2 norm."""


def reference_step(step: DecodeStep) -> Float[Tensor, "N HV*V"]:
    """Return the normed, gated output; the state and the windows are updated in place."""
    heads, group = step.heads, step.value_heads // step.heads
    q, k, v = map(_convolved, (step.q, step.k, step.v), step.convolutions)
    if step.activate_qk:
        q, k = F.silu(q), F.silu(k)
    q, k = (_normalized(x.unflatten(1, (heads, -1))).repeat_interleave(group, 1) for x in (q, k))
    v = F.silu(v).unflatten(1, (step.value_heads, -1))
    state = step.state.transpose(2, 3) if step.state_v_first else step.state
    before = state.to(v.dtype)
    if step.decay is not None:
        before = before * _retained(step.decay, step.value_heads, v.dtype)
    rate = v.new_full(v.shape[:2], step.beta_scale)
    if step.beta is not None:
        rate = rate * step.beta.to(v.dtype).sigmoid()
    change = rate[..., None] * (v - torch.einsum("nhk,nhkv->nhv", k, before))
    after = before + k[..., None] * change[..., None, :]
    out = _normed(torch.einsum("nhk,nhkv->nhv", q * step.query_scale, after), step.output)
    if step.real is not None:
        padding = step.real == 0
        out = out.masked_fill(padding[:, None], 0)
        after = torch.where(padding[:, None, None, None], state.to(after.dtype), after)
    state.copy_(after)
    for x, convolution in zip((step.q, step.k, step.v), step.convolutions, strict=True):
        _shift(x, convolution, step.real)
    return out.to(step.q.dtype)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _convolved(x: Float[Tensor, "N D"], convolution: Convolution) -> Float[Tensor, "N D"]:
    taps = torch.cat([_wide(convolution.window[..., 1:]), _wide(x)[..., None]], -1)
    y = (taps * convolution.weight).sum(-1)
    return y if convolution.bias is None else y + convolution.bias


def _shift(x: Float[Tensor, "N D"], convolution: Convolution, real: Tensor | None) -> None:
    window = convolution.window
    after = torch.cat([window[..., 1:], x.to(window.dtype)[..., None]], -1)
    window.copy_(after if real is None else torch.where(real[:, None, None] == 0, window, after))


def _normalized(x: Tensor) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True) + EPS).sqrt()


def _retained(decay: Decay, value_heads: int, dtype: torch.dtype) -> Float[Tensor, "N HV K 1"]:
    g = decay.input.to(dtype)
    if decay.a_log is not None:
        g = g if decay.dt_bias is None else g + decay.dt_bias
        g = g.unflatten(1, (value_heads, -1))
        a = decay.a_log.to(dtype).exp()[:, None]
        bound = decay.lower_bound
        g = -a * F.softplus(g) if bound is None else bound * (a * g).sigmoid()
    return g.reshape(len(g), value_heads, -1, 1).exp()


def _normed(o: Float[Tensor, "N HV V"], output: Output) -> Float[Tensor, "N HV*V"]:
    o = o / (o.square().mean(-1, keepdim=True) + output.eps).sqrt()
    o = (o if output.weight is None else o * output.weight).flatten(1)
    if output.gate is None:
        return o
    gate = output.gate.to(o.dtype)
    return o * (F.silu(gate) if output.activation == "swish" else gate.sigmoid())
