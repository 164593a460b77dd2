"""Pointwise activations, forward and backward, with the signatures of fla 0.6.0's kernels."""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "logsigmoid_bwd",
    "logsigmoid_fwd",
    "sigmoid_bwd",
    "sigmoid_fwd",
    "swiglu_fwd",
    "swiglu_fwdbwd",
    "swish_bwd",
    "swish_fwd",
]


def sigmoid_fwd(x: Tensor, output_contiguous: bool = False) -> Tensor:
    """Return the sigmoid of x, any shape."""
    return x.sigmoid()


def sigmoid_bwd(x: Tensor, dy: Tensor, output_contiguous: bool = False) -> Tensor:
    """Return the gradient of x."""
    return torch.ops.aten.sigmoid_backward(dy, x.sigmoid())


def logsigmoid_fwd(x: Tensor, temperature: float = 1.0, output_contiguous: bool = False) -> Tensor:
    """Return `logsigmoid(x) / temperature`, any shape."""
    return F.logsigmoid(x) / temperature


def logsigmoid_bwd(
    x: Tensor, dy: Tensor, temperature: float = 1.0, output_contiguous: bool = False
) -> Tensor:
    """Return the gradient of x."""
    return dy * (-x).sigmoid() / temperature


def swish_fwd(x: Tensor, output_contiguous: bool = False) -> Tensor:
    """Return `x sigmoid(x)`, any shape."""
    return F.silu(x)


def swish_bwd(x: Tensor, dy: Tensor, output_contiguous: bool = False) -> Tensor:
    """Return the gradient of x."""
    return torch.ops.aten.silu_backward(dy, x)


def swiglu_fwd(x: Tensor, y: Tensor, output_contiguous: bool = False) -> Tensor:
    """Return `silu(x) y`, any shape."""
    return F.silu(x).mul_(y)


def swiglu_fwdbwd(
    x: Tensor, y: Tensor, g: Tensor, use_weight: bool = False, output_contiguous: bool = False
) -> tuple[Tensor, ...]:
    """Return the gradients of x and y, and with `use_weight` the output too."""
    gate = F.silu(x)
    dx = torch.ops.aten.silu_backward(g * y, x)
    dy = g * gate
    return (dx, dy, gate.mul_(y)) if use_weight else (dx, dy)
