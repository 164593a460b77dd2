"""The gate of Kimi Delta Attention: log-decays per key channel."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kernels.gated_delta_rule.chunk import wide_dtype


def fused_kda_gate(
    g: Float[Tensor, "... H K"],
    A_log: Float[Tensor, " H"] | None = None,
    dt_bias: Float[Tensor, " HK"] | None = None,
    lower_bound: float | None = None,
    output_dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "... H K"]:
    """Return log-decays; the signature is that of fla 0.6.0's function.

    They are `-exp(A_log) softplus(g + dt_bias)`, or with `lower_bound`
    `lower_bound sigmoid(exp(A_log) (g + dt_bias))`, where `A_log` None stands for 0. ValueError is
    raised if `A_log` and `lower_bound` are both None.
    """
    return kda_log_decay(g, A_log, dt_bias, lower_bound).to(output_dtype)


def kda_log_decay(
    g: Float[Tensor, "... H K"],
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    lower_bound: float | None,
) -> Float[Tensor, "... H K"]:
    """Return the log-decays of `fused_kda_gate`, in float32, or in float64 for float64 input."""
    if A_log is None and lower_bound is None:
        raise ValueError("the gate needs A_log unless lower_bound is set")
    dtype = wide_dtype(g)
    x = g.to(dtype)
    if dt_bias is not None:
        x = x + dt_bias.to(dtype).view(g.shape[-2:])
    rate = None if A_log is None else A_log.to(dtype).view(-1, 1).exp()
    if lower_bound is None:
        assert rate is not None
        return -rate * F.softplus(x)
    return lower_bound * (x if rate is None else rate * x).sigmoid()
