"""The distance of a student's hidden states from its teacher's."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flame.training.losses.scaling import scaled
from flame.training.losses.tokens import IGNORE_INDEX, wide


def hidden_distance(student: Sequence[Tensor], teacher: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Return `Σ ‖s − t‖² / ‖t‖²` over tokens, averaged over layers; differentiable in `student`.

    Args:
        student, teacher: states `[B, T, D]` of each layer, as many and as wide in both.
        labels: `[B, T]`; a token at `IGNORE_INDEX` counts 0.
    """
    distances = [
        _RelativeDistance.apply(own, other, labels)
        for own, other in zip(student, teacher, strict=True)
    ]
    return torch.stack(distances).mean()


class _RelativeDistance(torch.autograd.Function):
    """One layer's distance; it keeps only the gradient, in the student's dtype."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        kind = wide(student.dtype)
        target = teacher.to(kind)
        difference = student.to(kind) - target
        lengths = target.square().sum(-1).clamp_min(torch.finfo(kind).tiny)
        weights = (labels != IGNORE_INDEX).to(kind) / lengths
        ctx.save_for_backward((2 * difference * weights[..., None]).to(student.dtype))
        return (difference.square().sum(-1) * weights).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return scaled(gradient, scale), None, None
