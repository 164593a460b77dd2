"""Losses of hidden states: cross entropy, KL divergence and hidden distance from a teacher.

Cross entropy and KL need logits, which exist for one chunk of tokens at a time. The forward pass
computes a chunk's logits, its losses and their gradient, and multiplies the gradient into those of
the hidden states and of the output projection at once. So neither pass holds more than one chunk
of logits, and no product is computed twice.

Legend: `n` tokens of a chunk, `D` width of the hidden states, `V` vocabulary, `z` logits.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from flame.training.losses.chunk_rows import chunk_rows
from flame.training.losses.scaling import scaled
from flame.training.losses.tokens import PLAIN, Mix, chunk_losses, wide


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
        """Return the logits `[n, V]` of hidden states `[n, D]`, in their dtype."""
        return nn.functional.linear(hidden, self.weight, self.bias)


def chunked_losses(
    hidden: Tensor,
    projection: Projection,
    labels: Tensor,
    *,
    teacher: tuple[Tensor, Projection] | None = None,
    mix: Mix = PLAIN,
    chunk_tokens: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mixed loss, cross entropy and T² · KL, each summed over the tokens, in nats.

    The mixed loss is differentiable once in `hidden` and `projection`; the other two are detached.

    Args:
        hidden: the student's states before the output projection, `[…, D]`.
        labels: the token after each, `[…]`; at `IGNORE_INDEX` all losses are 0.
        teacher: its hidden states `[…, D']` of the same tokens, and its projection.
        chunk_tokens: tokens whose logits exist together; 0 means `chunk_rows`.
    """
    weight = projection.weight
    rows = chunk_tokens or chunk_rows(weight.shape[0], weight.requires_grad, weight.device.type)
    other = None if teacher is None else (teacher[0].flatten(0, -2), teacher[1])
    wanted = torch.is_grad_enabled()
    return _ChunkedLosses.apply(
        hidden.flatten(0, -2),
        weight,
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
        sums = torch.zeros(2, dtype=wide(hidden.dtype), device=hidden.device)
        for start in range(0, hidden.shape[0], rows):
            part = slice(start, start + rows)
            told = None if teacher is None else teacher[1](teacher[0][part])
            *losses, gradient = chunk_losses(
                project(hidden[part]), labels[part], told, mix, gradients.wanted
            )
            del told
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
        self.wanted = any(needs)
        self.hidden = torch.empty_like(hidden) if needs[0] else None
        # In bf16 a sum over many chunks would lose the small terms.
        kind = wide(hidden.dtype)
        self.weight = torch.zeros_like(weight, dtype=kind) if needs[1] else None
        self.bias = torch.zeros_like(bias, dtype=kind) if needs[2] else None

    def add(self, part: slice, logits: Tensor | None) -> None:
        """Add what the gradient `[n, V]` of one chunk's logits contributes."""
        if logits is None:
            return
        if self.bias is not None:
            self.bias += logits.sum(0, dtype=self.bias.dtype)
        if self.hidden is not None:
            torch.mm(logits, self._weight, out=self.hidden[part])
        if self.weight is None:
            return
        if self.weight.dtype == logits.dtype:
            self.weight.addmm_(logits.mT, self._inputs[part])
        else:
            self.weight += logits.mT @ self._inputs[part]

    def tensors(self) -> list[Tensor | None]:
        """Return the gradients of hidden states, weight and bias in the dtypes of the three."""
        weight = None if self.weight is None else self.weight.to(self._weight.dtype)
        bias = None if self.bias is None else self.bias.to(self._weight.dtype)
        return [self.hidden, weight, bias]
