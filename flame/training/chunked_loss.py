"""Cross entropy, and KL divergence from a teacher, without the full logits of either model.

Tokens are taken a chunk at a time: logits of the chunk, its losses, and their gradient, which is
multiplied back into the hidden states and the output projection at once. So neither the forward nor
the backward pass holds more than one chunk of logits, and no product is computed twice.

Legend: `N` tokens, `D` width of the hidden states, `V` vocabulary, `z` logits.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

IGNORE_INDEX = -100
"""Label of a token that has no loss."""

LOGITS_AT_A_TIME = 2**24
"""Logits of one chunk, unless the tokens of a chunk are given: 64 MiB in fp32."""


@dataclass(frozen=True)
class Projection:
    """What turns hidden states into logits: the output embedding, whole on this rank."""

    weight: Tensor
    """`[V, D]`."""
    bias: Tensor | None = None

    @classmethod
    def of(cls, head: nn.Module) -> "Projection":
        weight, bias = head.weight, getattr(head, "bias", None)
        assert isinstance(weight, Tensor) and (bias is None or isinstance(bias, Tensor))
        return cls(weight, bias)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits `[n, V]` of hidden states `[n, D]`, at least float32."""
        logits = nn.functional.linear(hidden, self.weight, self.bias)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


@dataclass(frozen=True)
class Mix:
    """Weights of the two losses: `cross_entropy · CE + kl · T² · KL(teacher ‖ student)`."""

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
    """Sums over tokens: the mixed loss (differentiable), cross entropy, T² · KL (both in nats).

    Args:
        hidden: student's states before the output projection, `[…, D]`.
        labels: the token that follows each, `[…]`; `IGNORE_INDEX` has no loss of either kind.
        teacher: its hidden states `[…, D']` of the same tokens, and its projection.
        chunk_tokens: tokens whose logits exist together; 0: `LOGITS_AT_A_TIME / V`.
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
        sums = torch.zeros(2, dtype=_accumulator(hidden), device=hidden.device)
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
        parts = [None if part is None else times(part, scale) for part in ctx.saved_tensors]
        return (*parts, None, None)


class _Gradients:
    """Gradients of hidden states, weight and bias, summed up chunk by chunk, where wanted."""

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
        precise = _accumulator(hidden)
        self.hidden = torch.empty_like(hidden) if needs[0] else None
        # A sum of many chunks: bf16 would lose the small ones.
        self.weight = torch.zeros_like(weight, dtype=precise) if needs[1] else None
        self.bias = torch.zeros_like(bias, dtype=precise) if needs[2] else None

    def add(self, part: slice, logits: Tensor) -> None:
        """Take in the gradient `[n, V]` of one chunk's logits."""
        if self.bias is not None:
            self.bias += logits.sum(0)
        logits = logits.to(self._inputs.dtype)
        if self.hidden is not None:
            torch.mm(logits, self._weight, out=self.hidden[part])
        if self.weight is not None:
            self.weight += logits.mT @ self._inputs[part]

    def tensors(self) -> list[Tensor | None]:
        """In the dtypes of what they are gradients of."""
        weight = None if self.weight is None else self.weight.to(self._weight.dtype)
        bias = None if self.bias is None else self.bias.to(self._weight.dtype)
        return [self.hidden, weight, bias]


def token_losses(
    logits: Tensor, labels: Tensor, teacher: Tensor | None, mix: Mix
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Cross entropy and T² · KL summed over the rows of a chunk, and the mix's gradient.

    Args:
        logits: the student's, `[n, V]`.
        teacher: the teacher's, `[n, V]`.

    Returns:
        `(cross entropy, T² · KL)`, and the gradient `[n, V]` of the mix in the logits.
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
    """T² · KL over the rows; its gradient, `T (softmax(z / T) − teacher's)`, goes to `gradient`."""
    temperature = mix.temperature
    log_student = (logits / temperature).log_softmax(-1)
    log_teacher = (teacher / temperature).log_softmax(-1)
    probabilities = log_teacher.exp()
    divergence = (log_teacher.sub_(log_student).mul_(probabilities)).sum(-1)
    slope = log_student.exp_().sub_(probabilities)
    gradient.add_(slope, alpha=mix.kl * temperature)
    return divergence.masked_fill(ignored, 0).sum() * temperature**2


def times(tensor: Tensor, scale: Tensor) -> Tensor:
    """`tensor · scale` in the dtype of `tensor`, by the whole of `scale`, a scalar.

    Rounded to bf16 the scale would be off by up to 1/256, and with it the whole gradient. No more
    numbers than a chunk of logits has are held in a wider dtype.
    """
    if tensor.dtype == scale.dtype:
        return tensor * scale
    result = torch.empty_like(tensor)
    rows = max(1, LOGITS_AT_A_TIME * tensor.shape[0] // tensor.numel())
    for own, part in zip(tensor.split(rows), result.split(rows), strict=True):
        torch.mul(own.to(scale.dtype), scale, out=part)
    return result


def _accumulator(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
