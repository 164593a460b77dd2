"""The delta rule token by token, for decoding; longer inputs go to the chunked form."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kernels.gated_delta_rule.chunk import (
    ChunkedRule,
    Options,
    delta_rule,
    gate_beta,
    l2_normalize,
    log_decay,
    state_layout,
    wide_dtype,
)
from kernels.gated_delta_rule.wy import chunked_delta_rule

MAX_STEPS = 4
"""Documents of at most this many tokens (DeltaProduct's steps counted) are run token by token."""


def fused_recurrent_gated_delta_rule(
    q: Float[Tensor, "B T Hk K"],
    k: Float[Tensor, "B T Hk K"],
    v: Float[Tensor, "B T H V"],
    g: Float[Tensor, "B T H"] | None = None,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    beta: Float[Tensor, "B T H"] | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "B T H V"], Tensor | None]:
    """Return outputs and final states; the signature is that of fla 0.6.0's operator.

    Arguments are those of `chunk_gated_delta_rule`. Decays per channel (`gk`, `gv`) and a beta per
    value channel raise NotImplementedError.
    """
    if gk is not None or gv is not None or (beta is not None and beta.ndim == v.ndim):
        raise NotImplementedError("the CPU path has one decay and one beta a head: no gk, gv")
    state_v_first = state_layout(state_v_first, kwargs)
    beta = torch.ones_like(v[..., 0]) if beta is None else beta
    beta = gate_beta(beta, use_beta_sigmoid_in_kernel, allow_neg_eigval)
    if use_gate_in_kernel:
        if g is None:
            raise ValueError("use_gate_in_kernel=True needs g, the gate's input")
        g = log_decay(g, A_log, dt_bias)
    flags = (output_final_state, use_qk_l2norm_in_kernel)
    options = Options(scale, initial_state, *flags, cu_seqlens, state_v_first)
    return recurrent_delta_rule(q, k, v, beta, g, options)


def recurrent_delta_rule(
    q: Float[Tensor, "B T Hk K"],
    k: Float[Tensor, "B T Hk K"],
    v: Float[Tensor, "B T H V"],
    beta: Float[Tensor, "B T H"],
    g: Float[Tensor, "B T H *K"] | None,
    options: Options,
    rule: ChunkedRule = chunked_delta_rule,
) -> tuple[Float[Tensor, "B T H V"], Tensor | None]:
    """`delta_rule`, token by token if all documents have the same `MAX_STEPS` tokens or fewer."""
    steps = _equal_length(q, options.cu_seqlens)
    if not 1 <= steps <= MAX_STEPS:
        return delta_rule(q, k, v, beta, g, options, rule=rule)

    scale = k.shape[-1] ** -0.5 if options.scale is None else options.scale
    state = _key_first(options, v, k, steps)
    outs = []
    decays = [None] * steps if g is None else _tokens(g, steps)
    tokens = zip(*(_tokens(x, steps) for x in (q, k, v, beta)), decays, strict=True)
    for query, key, value, rate, decay in tokens:
        out, state = _step(query, key, value, rate, decay, scale, state, options.normalize)
        outs.append(out)
    o = outs[0] if steps == 1 else torch.stack(outs, 1)
    if not options.output_final_state:
        return o.view(v.shape).to(v.dtype), None
    state = state.transpose(-1, -2) if options.state_v_first else state
    return o.view(v.shape).to(v.dtype), state.contiguous()


def _tokens(x: Tensor, steps: int) -> Sequence[Tensor]:
    """Return for each step its token of every document, `[N, ...]`."""
    if steps == 1:
        return (x.reshape(-1, *x.shape[2:]),)
    return x.reshape(-1, steps, *x.shape[2:]).unbind(1)


def _equal_length(q: Tensor, cu_seqlens: Tensor | None) -> int:
    """Return the number of tokens of every document; 0 if they differ or do not fill the row."""
    if cu_seqlens is None:
        return q.shape[1]
    bounds = cu_seqlens.tolist()
    length = q.shape[1] // max(len(bounds) - 1, 1)
    fits = q.shape[0] == 1 and bounds == list(range(0, q.shape[1] + 1, length or 1))
    return length if fits else 0


def _step(
    q: Float[Tensor, "N Hk K"],
    k: Float[Tensor, "N Hk K"],
    v: Float[Tensor, "N H V"],
    beta: Float[Tensor, "N H"],
    g: Float[Tensor, "N H *K"] | None,
    scale: float,
    state: Float[Tensor, "N H K V"],
    normalize: bool,
) -> tuple[Float[Tensor, "N H V"], Float[Tensor, "N H K V"]]:
    """Return the outputs and the next states; `state` is not written to."""
    dtype, groups, size = state.dtype, v.shape[1] // k.shape[1], v.shape[0] * v.shape[1]
    pair = torch.stack([q, k], -2).to(dtype)
    pair = l2_normalize(pair) if normalize else pair
    pair = pair.repeat_interleave(groups, 1) if groups > 1 else pair
    query, key = pair.view(size, 2, -1).split(1, 1)
    after = state.flatten(0, 1)
    if g is not None:
        after = after * g.to(dtype).exp().view(size, -1, 1)
    value = v.to(dtype).reshape(size, 1, -1)
    change = torch.baddbmm(value, key, after, alpha=-1) * beta.to(dtype).reshape(size, 1, 1)
    # The decayed state is nobody else's, unless a backward pass will read it.
    if g is not None and not after.requires_grad:
        after.addcmul_(key.mT, change)
    else:
        after = torch.addcmul(after, key.mT, change)
    out = torch.bmm(query, after) * scale
    return out.view(v.shape), after.view(state.shape)


def _key_first(options: Options, v: Tensor, k: Tensor, steps: int) -> Float[Tensor, "N H K V"]:
    state, dtype = options.initial_state, wide_dtype(k)
    if state is None:
        documents = v.shape[:2].numel() // steps
        return v.new_zeros(documents, v.shape[2], k.shape[3], v.shape[3], dtype=dtype)
    return (state.transpose(-1, -2) if options.state_v_first else state).to(dtype)
