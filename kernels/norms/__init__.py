"""Layer norm, RMS norm, both with a gate, and the L2 norm, forward and backward.

The functions have the signatures of fla 0.6.0's kernels. They take rows `[N, D]` and return
statistics `[N]` for the backward, in float32, or in float64 for float64 rows.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kernels.gated_delta_rule.chunk import wide_dtype

__all__ = [
    "l2norm_bwd",
    "l2norm_fwd",
    "layer_norm_bwd",
    "layer_norm_fwd",
    "layer_norm_gated_bwd",
    "layer_norm_gated_fwd",
]

_SILU = ("silu", "swish")


def layer_norm_fwd(
    x: Float[Tensor, "N D"],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    residual_dtype: torch.dtype | None = None,
    is_rms_norm: bool = False,
    num_groups: int = 1,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Return the output, mean (None for RMS), 1/std and the sum of x and residual.

    The output has `out_dtype`, or that of x. The sum has the residual's dtype; without a residual
    it is x itself, or x in `residual_dtype` if that is given.

    With `num_groups`, `weight` and `bias` are `[num_groups * D]` and row i takes part i modulo
    `num_groups` of them.
    """
    kept, wide = _add_residual(x, residual, residual_dtype)
    mean, rstd = _statistics(wide, eps, is_rms_norm)
    y = _affine(_normalized(wide, mean, rstd), weight, bias, num_groups)
    return y.to(out_dtype or x.dtype), mean, rstd, kept


def layer_norm_bwd(
    dy: Float[Tensor, "N D"],
    x: Float[Tensor, "N D"],
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
    dres: Tensor | None = None,
    has_residual: bool = False,
    is_rms_norm: bool = False,
    x_dtype: torch.dtype | None = None,
    recompute_output: bool = False,
    num_groups: int = 1,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, weight, bias, residual, and the output if it is recomputed."""
    assert rstd is not None
    wide = _wide(x)
    normal = _normalized(wide, mean, rstd)
    grad = dy.to(wide.dtype)
    dx = _norm_gradient(_affine(grad, weight, None, num_groups), normal, rstd, is_rms_norm)
    dx = dx if dres is None else dx + dres
    dw = None if weight is None else _grouped_sum(grad * normal, num_groups).to(weight.dtype)
    db = None if bias is None else _grouped_sum(grad, num_groups).to(bias.dtype)
    found = dx.to(x_dtype or x.dtype), dw, db, dx.to(x.dtype) if has_residual else None
    if not recompute_output:
        return found
    return *found, _affine(normal, weight, bias, num_groups).to(dy.dtype)


def layer_norm_gated_fwd(
    x: Float[Tensor, "N D"],
    g: Float[Tensor, "N D"],
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str = "swish",
    eps: float = 1e-5,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    residual_dtype: torch.dtype | None = None,
    is_rms_norm: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Return `norm(x) * activation(g)`, mean, 1/std and the sum of x and residual."""
    kept, wide = _add_residual(x, residual, residual_dtype)
    mean, rstd = _statistics(wide, eps, is_rms_norm)
    y = _affine(_normalized(wide, mean, rstd), weight, bias).mul_(_gate(_wide(g), activation))
    return y.to(out_dtype or x.dtype), mean, rstd, kept


def layer_norm_gated_bwd(
    dy: Float[Tensor, "N D"],
    x: Float[Tensor, "N D"],
    g: Float[Tensor, "N D"],
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str = "swish",
    eps: float = 1e-5,
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
    dresidual: Tensor | None = None,
    has_residual: bool = False,
    is_rms_norm: bool = False,
    x_dtype: torch.dtype | None = None,
    recompute_output: bool = False,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, gate, weight, bias, residual; if asked for, also the output."""
    assert rstd is not None
    gate = _wide(g)
    opened = _gate(gate, activation)
    ungated = _affine(_normalized(_wide(x), mean, rstd), weight, bias)
    wide = dy.to(gate.dtype)
    dg = _gate_gradient(wide * ungated, gate, activation).to(x_dtype or g.dtype)
    rest = (has_residual, is_rms_norm, x_dtype)
    dx, dw, db, dres = layer_norm_bwd(wide * opened, x, weight, bias, mean, rstd, dresidual, *rest)
    if not recompute_output:
        return dx, dg, dw, db, dres
    return dx, dg, dw, db, dres, (ungated * opened).to(dy.dtype)


def l2norm_fwd(
    x: Float[Tensor, "... D"], eps: float = 1e-6, output_dtype: torch.dtype | None = None
) -> tuple[Float[Tensor, "... D"], Float[Tensor, "..."]]:
    """Return `x / sqrt(|x|^2 + eps)` and the factor that multiplied x."""
    wide = _wide(x)
    rstd = torch.rsqrt(wide.square().sum(-1) + eps)
    return (wide * rstd.unsqueeze(-1)).to(output_dtype or x.dtype), rstd


def l2norm_bwd(
    y: Float[Tensor, "... D"],
    rstd: Float[Tensor, "..."],
    dy: Float[Tensor, "... D"],
    eps: float = 1e-6,
) -> Float[Tensor, "... D"]:
    """Return the gradient of x, given the forward's output `y` and factor `rstd`."""
    wide, grad = _wide(y), dy.to(rstd.dtype)
    along = (grad * wide).sum(-1, keepdim=True)
    return ((grad - along * wide) * rstd.unsqueeze(-1)).to(y.dtype)


def _wide(x: Tensor) -> Tensor:
    return x.to(wide_dtype(x))


def _add_residual(
    x: Tensor, residual: Tensor | None, residual_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """Return the sum of x and residual in the dtype to store, and in the dtype to compute in.

    The first is the residual's dtype. Without a residual the sum is x, stored as it is, or in
    `residual_dtype` if that is given. The second is float32, or float64 for float64 input.
    """
    wide = _wide(x) if residual is None else _wide(x) + residual
    dtype = residual_dtype if residual is None else residual.dtype
    stored = dtype is not None and (residual is not None or dtype != x.dtype)
    return (wide.to(dtype) if stored else x), wide


def _statistics(x: Tensor, eps: float, is_rms_norm: bool) -> tuple[Tensor | None, Tensor]:
    if is_rms_norm:
        return None, torch.rsqrt(x.square().mean(-1) + eps)
    variance, mean = torch.var_mean(x, -1, correction=0)
    return mean, torch.rsqrt(variance + eps)


def _normalized(x: Tensor, mean: Tensor | None, rstd: Tensor) -> Tensor:
    return (x if mean is None else x - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)


def _norm_gradient(dnormal: Tensor, normal: Tensor, rstd: Tensor, is_rms_norm: bool) -> Tensor:
    along = (dnormal * normal).mean(-1, keepdim=True)
    dx = torch.addcmul(dnormal, normal, along, value=-1)
    dx = dx if is_rms_norm else dx - dnormal.mean(-1, keepdim=True)
    return dx.mul_(rstd.unsqueeze(-1))


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int = 1) -> Tensor:
    """Return x times weight plus bias in the dtype of x, as a new tensor."""
    rows = x.view(-1, groups, x.shape[-1])
    y = rows.clone() if weight is None else rows * weight.to(x.dtype).view(groups, -1)
    return (y if bias is None else y + bias.to(x.dtype).view(groups, -1)).view_as(x)


def _grouped_sum(x: Tensor, groups: int) -> Tensor:
    return x.view(-1, groups * x.shape[-1]).sum(0)


def _gate(g: Tensor, activation: str) -> Tensor:
    return torch.nn.functional.silu(g) if activation in _SILU else _sigmoid(g, activation)


def _gate_gradient(grad: Tensor, g: Tensor, activation: str) -> Tensor:
    if activation in _SILU:
        return torch.ops.aten.silu_backward(grad, g)
    return torch.ops.aten.sigmoid_backward(grad, _sigmoid(g, activation))


def _sigmoid(g: Tensor, activation: Any) -> Tensor:
    if activation != "sigmoid":
        raise ValueError(f"the gate's activation is {activation!r}, must be silu, swish or sigmoid")
    return g.sigmoid()
