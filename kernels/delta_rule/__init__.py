"""The delta rule without decay, on the core of `kernels.gated_delta_rule`."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kernels.gated_delta_rule.chunk import Options, delta_rule, given_chunk_size
from kernels.gated_delta_rule.recurrent import recurrent_delta_rule

__all__ = ["chunk_delta_rule", "fused_recurrent_delta_rule"]


def chunk_delta_rule(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    beta: Float[Tensor, "B T H"],
    scale: float | None = None,
    initial_state: Float[Tensor, "N H K V"] | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "N H K V"] | None]:
    """Return outputs and final states; the signature is that of fla 0.6.0's operator.

    `beta` is what multiplies the update, after any sigmoid. `scale` is `K ** -0.5` unless given.
    Computes in float32 (fla's Triton kernel refuses it), in float64 for float64 input. Raises
    ValueError for shapes and options that do not fit.
    """
    if "head_first" in kwargs:
        raise ValueError("head_first is gone: inputs are [B, T, H, ...]")
    bounds = cu_seqlens if cu_seqlens_cpu is None else cu_seqlens_cpu
    options = Options(scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, bounds)
    return delta_rule(q, k, v, beta, None, options, given_chunk_size(kwargs))


def fused_recurrent_delta_rule(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    beta: Float[Tensor, "B T H"] | None = None,
    scale: float | None = None,
    initial_state: Float[Tensor, "N H K V"] | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "N H K V"] | None]:
    """Return what `chunk_delta_rule` returns, computed token by token for short documents.

    Arguments are those of `chunk_delta_rule`; `beta` None means 1.
    """
    if beta is None:
        beta = torch.ones_like(v[..., 0])
    options = Options(scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens)
    return recurrent_delta_rule(q, k, v, beta, None, options)
