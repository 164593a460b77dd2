"""The delta rule one token at a time, for decoding; longer inputs go to the chunked form."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kernels.gated_delta_rule.chunk import (
    _state_layout,
    compute_dtype,
    delta_rule,
    gate_beta,
    l2_normalize,
    log_decay,
)


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

    Arguments as in `chunk_gated_delta_rule`. Decays per channel (`gk`, `gv`) and a beta per
    value channel raise NotImplementedError.
    """
    if gk is not None or gv is not None or (beta is not None and beta.ndim == v.ndim):
        raise NotImplementedError("the CPU path has one decay and one beta a head: no gk, gv")
    state_v_first = _state_layout(state_v_first, kwargs)
    beta = torch.ones_like(v[..., 0]) if beta is None else beta
    beta = gate_beta(beta, use_beta_sigmoid_in_kernel, allow_neg_eigval)
    if use_gate_in_kernel:
        if g is None:
            raise ValueError("use_gate_in_kernel=True needs g, the gate's input")
        g = log_decay(g, A_log, dt_bias)
    return recurrent_delta_rule(
        q,
        k,
        v,
        beta,
        g,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        normalize=use_qk_l2norm_in_kernel,
        state_v_first=state_v_first,
        cu_seqlens=cu_seqlens,
    )


def recurrent_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    *,
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    normalize: bool,
    state_v_first: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Run one step where every document has one token, else the chunked form."""
    if not _one_token_each(q, cu_seqlens):
        return delta_rule(
            q,
            k,
            v,
            beta,
            g,
            scale=scale,
            initial_state=initial_state,
            output_final_state=output_final_state,
            normalize=normalize,
            state_v_first=state_v_first,
            cu_seqlens=cu_seqlens,
        )
    queries, keys, values, rates = (x.flatten(0, 1) for x in (q, k, v, beta))
    decays = None if g is None else g.flatten(0, 1)
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    flags = (scale, initial_state, normalize, state_v_first)
    out, state = _step(queries, keys, values, rates, decays, *flags)
    return out.view(v.shape).to(v.dtype), state if output_final_state else None


def _one_token_each(q: Tensor, cu_seqlens: Tensor | None) -> bool:
    batch, tokens = q.shape[:2]
    if cu_seqlens is None:
        return tokens == 1
    return batch == 1 and len(cu_seqlens) == tokens + 1 and bool((cu_seqlens.diff() == 1).all())


def _step(
    q: Float[Tensor, "N Hk K"],
    k: Float[Tensor, "N Hk K"],
    v: Float[Tensor, "N H V"],
    beta: Float[Tensor, "N H"],
    g: Float[Tensor, "N H"] | None,
    scale: float,
    state: Tensor | None,
    normalize: bool,
    state_v_first: bool,
) -> tuple[Float[Tensor, "N H V"], Tensor]:
    dtype, groups = compute_dtype(q), v.shape[1] // k.shape[1]
    pair = torch.stack([q, k]).to(dtype)
    pair = l2_normalize(pair) if normalize else pair
    pair = pair.repeat_interleave(groups, 2) if groups > 1 else pair
    query, key = (pair[0] * scale).unsqueeze(-1), pair[1].unsqueeze(-1)
    value = v.to(dtype).unsqueeze(-1)
    state = _value_first(state, value, key, state_v_first)
    if g is not None:
        state = state * g.to(dtype).exp()[..., None, None]
    change = (value - state @ key) * beta.to(dtype)[..., None, None]
    state = state + change * key.transpose(-1, -2)
    out = (state @ query).squeeze(-1)
    return out, state if state_v_first else state.transpose(-1, -2).contiguous()


def _value_first(
    state: Tensor | None, value: Tensor, key: Tensor, state_v_first: bool
) -> Float[Tensor, "N H V K"]:
    if state is None:
        return value.new_zeros(*value.shape[:3], key.shape[2])
    return (state if state_v_first else state.transpose(-1, -2)).to(value.dtype)
