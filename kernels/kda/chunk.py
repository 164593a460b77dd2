"""Kimi Delta Attention on tokens: fla's flags around `chunked_kda`."""

from typing import Any

from jaxtyping import Float
from torch import Tensor

from kernels.gated_delta_rule.chunk import (
    Options,
    delta_rule,
    gate_beta,
    given_chunk_size,
    state_layout,
)
from kernels.gated_delta_rule.recurrent import recurrent_delta_rule
from kernels.kda.gate import kda_log_decay
from kernels.kda.wy import chunked_kda

SAFE_LOWER_BOUND = -5


def chunk_kda(
    q: Float[Tensor, "B T Hk K"],
    k: Float[Tensor, "B T Hk K"],
    v: Float[Tensor, "B T H V"],
    g: Float[Tensor, "B T H K"],
    beta: Float[Tensor, "B T H"],
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    safe_gate: bool = False,
    lower_bound: float | None = None,
    disable_recompute: bool = False,
    return_intermediate_states: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    cp_context: Any = None,
    use_graph: bool = False,
    max_num_seqs: int | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "B T H V"], Tensor | None]:
    """Return outputs and final states; the signature is that of fla 0.6.0's operator.

    `g` has a log-decay for each key channel of each value head, or with `use_gate_in_kernel=True`
    the gate's input; the gate's `A_log` `[H]` and `dt_bias` `[H * K]` come by keyword (see
    `kernels.kda.gate`). `beta` is a logit with `use_beta_sigmoid_in_kernel`, doubled after the
    sigmoid with `allow_neg_eigval`. States are `[N, H, K, V]` or, with `state_v_first`,
    `[N, H, V, K]`. `scale` is `K ** -0.5` unless given. `safe_gate` and `disable_recompute` choose
    kernels on an accelerator and change no number here. Computes in float32, in float64 for
    float64 input. Raises ValueError for shapes and flags that do not fit, NotImplementedError for
    context parallelism, graph capture and intermediate states.
    """
    _refuse(
        cp_context=cp_context,
        use_graph=use_graph,
        return_intermediate_states=return_intermediate_states,
    )
    if safe_gate and use_gate_in_kernel:
        _check_lower_bound(lower_bound)
    if use_gate_in_kernel:
        g = kda_log_decay(g, kwargs.get("A_log"), kwargs.get("dt_bias"), lower_bound)
    _check_shapes(q, v, g, beta)
    beta = gate_beta(beta, use_beta_sigmoid_in_kernel, allow_neg_eigval)
    bounds = cu_seqlens if cu_seqlens_cpu is None else cu_seqlens_cpu
    flags = (output_final_state, use_qk_l2norm_in_kernel)
    options = Options(scale, initial_state, *flags, bounds, state_layout(state_v_first, kwargs))
    return delta_rule(q, k, v, beta, g, options, given_chunk_size(kwargs), chunked_kda)


def fused_recurrent_kda(
    q: Float[Tensor, "B T Hk K"],
    k: Float[Tensor, "B T Hk K"],
    v: Float[Tensor, "B T H V"],
    g: Float[Tensor, "B T H K"],
    beta: Float[Tensor, "B T H"],
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "B T H V"], Tensor | None]:
    """Return what `chunk_kda` returns, computed token by token for short documents.

    Arguments are those of `chunk_kda`. A beta per value channel raises NotImplementedError.
    """
    if beta.ndim == v.ndim:
        raise NotImplementedError("the CPU path has one beta a head, not one per value channel")
    if use_gate_in_kernel:
        g = kda_log_decay(g, A_log, dt_bias, lower_bound)
    _check_shapes(q, v, g, beta)
    beta = gate_beta(beta, use_beta_sigmoid_in_kernel, allow_neg_eigval)
    flags = (output_final_state, use_qk_l2norm_in_kernel)
    options = Options(scale, initial_state, *flags, cu_seqlens, state_layout(state_v_first, kwargs))
    return recurrent_delta_rule(q, k, v, beta, g, options, chunked_kda)


def _refuse(**given: Any) -> None:
    for name, value in given.items():
        if value:
            raise NotImplementedError(f"{name} has no CPU path: leave it out")


def _check_lower_bound(lower_bound: float | None) -> None:
    if lower_bound is None or not SAFE_LOWER_BOUND <= lower_bound < 0:
        raise ValueError(
            f"lower_bound is {lower_bound}, must be from {SAFE_LOWER_BOUND} to below 0 "
            "with safe_gate=True"
        )


def _check_shapes(q: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> None:
    expected = (*v.shape[:3], q.shape[-1])
    if g.shape != expected or beta.shape != v.shape[:3]:
        raise ValueError(
            f"g has shape {tuple(g.shape)}, beta {tuple(beta.shape)}: "
            f"must be {expected} and {tuple(v.shape[:3])}"
        )
