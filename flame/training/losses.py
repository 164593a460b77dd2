"""Losses of hidden states: cross entropy, KL divergence and hidden distance from a teacher.

Cross entropy and KL need logits, which exist for one chunk of tokens at a time. The forward pass
computes a chunk's logits, its losses and their gradient, and multiplies the gradient into those of
the hidden states and of the output projection at once. So neither pass holds more than one chunk
of logits, and no product is computed twice.

Legend: `n` tokens of a chunk, `D` width of the hidden states, `V` vocabulary, `z` logits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

IGNORE_INDEX = -100
"""Label of a token that has no loss."""

LOGITS_AT_A_TIME = 2**24
"""Logits of one chunk unless its tokens are given; 64 MiB in fp32."""


@dataclass(frozen=True)
class Projection:
    """The output projection, which turns hidden states into logits, whole on this rank."""

    weight: Tensor
    """`[V, D]`."""
    bias: Tensor | None = None

    @classmethod
    def of(cls, head: nn.Module) -> "Projection":
        """The projection of a gathered linear layer."""
        weight, bias = head.weight, getattr(head, "bias", None)
        assert isinstance(weight, Tensor) and (bias is None or isinstance(bias, Tensor))
        return cls(weight, bias)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return the logits `[n, V]` of hidden states `[n, D]`, in float32 or wider."""
        logits = nn.functional.linear(hidden, self.weight, self.bias)
        return logits.to(_wide(logits.dtype))


@dataclass(frozen=True)
class Mix:
    """Weights of `cross_entropy · CE + kl · T² · KL(teacher ‖ student)`, T the temperature."""

    cross_entropy: float = 1.0
    kl: float = 0.0
    temperature: float = 1.0


def chunked_losses(
    hidden: Tensor,
    projection: Projection,
    labels: Tensor,
    *,
    teacher: tuple[Tensor, Projection] | None = None,
    mix: Mix = Mix(),
    chunk_tokens: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mixed loss, cross entropy and T² · KL, each summed over the tokens, in nats.

    The mixed loss is differentiable once in `hidden` and `projection`; the other two are detached.

    Args:
        hidden: the student's states before the output projection, `[…, D]`.
        labels: the token after each, `[…]`; at `IGNORE_INDEX` all losses are 0.
        teacher: its hidden states `[…, D']` of the same tokens, and its projection.
        chunk_tokens: tokens whose logits exist together; 0 means `LOGITS_AT_A_TIME / V`.
    """
    rows = chunk_tokens or max(1, LOGITS_AT_A_TIME // projection.weight.shape[0])
    other = None if teacher is None else (teacher[0].flatten(0, -2), teacher[1])
    wanted = torch.is_grad_enabled()
    return _ChunkedLosses.apply(
        hidden.flatten(0, -2),
        projection.weight,
        projection.bias,
        labels.flatten(),
        (other, mix, rows, wanted),
    )


class _ChunkedLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        settings: tuple[tuple[Tensor, Projection] | None, Mix, int, bool],
    ) -> tuple[Tensor, Tensor, Tensor]:
        teacher, mix, rows, wanted = settings
        project = Projection(weight, bias)
        gradients = _Gradients(hidden, weight, bias, ctx.needs_input_grad[:3], wanted)
        sums = torch.zeros(2, dtype=_wide(hidden.dtype), device=hidden.device)
        for start in range(0, hidden.shape[0], rows):
            part = slice(start, start + rows)
            logits = project(hidden[part])
            target = None if teacher is None else teacher[1](teacher[0][part])
            losses, gradient = token_losses(logits, labels[part], target, mix)
            del logits, target
            sums += torch.stack(losses)
            gradients.add(part, gradient)
        ctx.save_for_backward(*gradients.tensors())
        cross_entropy, kl = sums.unbind()
        cross_entropy, kl = cross_entropy.clone(), kl.clone()
        ctx.mark_non_differentiable(cross_entropy, kl)
        return mix.cross_entropy * cross_entropy + mix.kl * kl, cross_entropy, kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        parts = [None if part is None else scaled(part, scale) for part in ctx.saved_tensors]
        return (*parts, None, None)


class _Gradients:
    """Sums of the gradients of hidden states, weight and bias over chunks; None if not needed."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        needed: tuple[bool, ...],
        wanted: bool,
    ) -> None:
        self._inputs, self._weight = hidden, weight
        needs = [need and wanted for need in needed]
        wide = _wide(hidden.dtype)
        self.hidden = torch.empty_like(hidden) if needs[0] else None
        # In bf16 a sum over many chunks would lose the small terms.
        self.weight = torch.zeros_like(weight, dtype=wide) if needs[1] else None
        self.bias = torch.zeros_like(bias, dtype=wide) if needs[2] else None

    def add(self, part: slice, logits: Tensor) -> None:
        """Add what the gradient `[n, V]` of one chunk's logits contributes."""
        if self.bias is not None:
            self.bias += logits.sum(0)
        logits = logits.to(self._inputs.dtype)
        if self.hidden is not None:
            torch.mm(logits, self._weight, out=self.hidden[part])
        if self.weight is not None:
            self.weight += logits.mT @ self._inputs[part]

    def tensors(self) -> list[Tensor | None]:
        """Return the gradients of hidden states, weight and bias in the dtypes of the three."""
        weight = None if self.weight is None else self.weight.to(self._weight.dtype)
        bias = None if self.bias is None else self.bias.to(self._weight.dtype)
        return [self.hidden, weight, bias]


def token_losses(
    logits: Tensor, labels: Tensor, teacher: Tensor | None, mix: Mix
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Return cross entropy and T² · KL summed over a chunk, and the mixed loss's gradient `[n, V]`.

    Args:
        logits: the student's, `[n, V]`.
        teacher: the teacher's logits, `[n, V]`, or None for no KL.
    """
    ignored = labels == IGNORE_INDEX
    targets = labels.masked_fill(ignored, 0)[:, None]
    log_student = logits.log_softmax(-1)
    picked = log_student.gather(1, targets)
    cross_entropy = -picked.squeeze(1).masked_fill(ignored, 0).sum()
    gradient = log_student.exp_()
    gradient.scatter_add_(1, targets, torch.full_like(picked, -1))
    gradient *= mix.cross_entropy
    kl = torch.zeros_like(cross_entropy)
    if teacher is not None:
        kl = _add_kl(logits, teacher, ignored, mix, gradient)
    gradient.masked_fill_(ignored[:, None], 0)
    return (cross_entropy, kl), gradient


def _add_kl(logits: Tensor, teacher: Tensor, ignored: Tensor, mix: Mix, gradient: Tensor) -> Tensor:
    """Return T² · KL summed over the rows, and add `mix.kl` times its gradient to `gradient`.

    The gradient in `logits` is `T (softmax(z / T) − softmax of the teacher's z / T)`.
    """
    temperature = mix.temperature
    log_student = (logits / temperature).log_softmax(-1)
    log_teacher = (teacher / temperature).log_softmax(-1)
    probabilities = log_teacher.exp()
    divergence = (log_teacher.sub_(log_student).mul_(probabilities)).sum(-1)
    slope = log_student.exp_().sub_(probabilities)
    gradient.add_(slope, alpha=mix.kl * temperature)
    return divergence.masked_fill(ignored, 0).sum() * temperature**2


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
        wide = _wide(student.dtype)
        target = teacher.to(wide)
        difference = student.to(wide) - target
        lengths = target.square().sum(-1).clamp_min(torch.finfo(wide).tiny)
        weights = (labels != IGNORE_INDEX).to(wide) / lengths
        ctx.save_for_backward((2 * difference * weights[..., None]).to(student.dtype))
        return (difference.square().sum(-1) * weights).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return scaled(gradient, scale), None, None


def scaled(tensor: Tensor, scale: Tensor) -> Tensor:
    """Return `tensor · scale` in the dtype of `tensor`, where `scale` is a wider scalar.

    Rounded to bf16, the scale and with it the whole gradient would be off by up to 1/256. At most
    `LOGITS_AT_A_TIME` numbers are held in the wider dtype.
    """
    if tensor.dtype == scale.dtype:
        return tensor * scale
    result = torch.empty_like(tensor)
    rows = max(1, LOGITS_AT_A_TIME * tensor.shape[0] // tensor.numel())
    for own, part in zip(tensor.split(rows), result.split(rows), strict=True):
        torch.mul(own.to(scale.dtype), scale, out=part)
    return result


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
