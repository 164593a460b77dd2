"""What a training step minimises, as a sum over tokens.

    total = ce_weight · CE + weight · T² · KL(teacher ‖ student) + hidden_weight · H

`CE` is the cross entropy with the next token. `KL` is between the distributions of teacher and
student over the next token, both with logits divided by the temperature `T` (T² keeps the size of
its gradient). `H` compares layer with layer: the squared distance of the student's output from the
teacher's over the teacher's squared length, token by token, the mean over the layers, the last one
after the final norm. Tokens with the label −100 count in none of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from flame.checkpoint.reference import resolve
from flame.recovery.distill import Teacher
from flame.training.chunked_loss import IGNORE_INDEX, Mix, Projection, chunked_losses, times
from flame.training.headless import output_head, run_headless


@dataclass(frozen=True)
class StepLosses:
    """Losses of one micro-batch, each a scalar: the sum over this rank's tokens."""

    total: Tensor
    """What is minimised; differentiable. The others are its parts, unweighted, and detached."""
    cross_entropy: Tensor
    """In nats."""
    kl: Tensor
    """T² · KL from the teacher, in nats; 0 without one."""
    hidden: Tensor
    """Relative squared distance from the teacher's states; 0 where it is not asked for."""


class Objective:
    """The loss of one run: computed in chunks of tokens, from a teacher if there is one.

    Args:
        model: the student, plain or sharded by `flame.model.shard`.
        distill: recipe section `[distill]` (`flame.config.Distill`).
        teacher: None trains on the text alone.
    """

    def __init__(self, model: nn.Module, distill: Any, teacher: Teacher | None = None) -> None:
        self.model, self.teacher = model, teacher
        self.chunk_tokens = distill.chunk_tokens
        self.hidden_weight = distill.hidden_weight if teacher else 0.0
        self.mix = Mix(distill.ce_weight, distill.weight, distill.temperature) if teacher else Mix()

    def __call__(self, inputs: Mapping[str, Any], labels: Tensor) -> StepLosses:
        """Losses of a batch; arguments as `next_token_loss`'s. Collective."""
        every_layer = self.hidden_weight > 0
        output = run_headless(self.model, inputs, output_hidden_states=every_layer)
        told, layers = None, ()
        if self.teacher is not None:
            states, layers = self.teacher.states(inputs, every_layer)
            told = (states, Projection.of(self.teacher.head)) if self.mix.kl else None
        total, cross_entropy, kl = chunked_losses(
            output.logits,
            Projection.of(output_head(self.model)),
            labels,
            teacher=told,
            mix=self.mix,
            chunk_tokens=self.chunk_tokens,
        )
        if self.teacher is not None:
            self.teacher.release()
        hidden = torch.zeros_like(cross_entropy)
        if every_layer:
            hidden = hidden_distance(output.hidden_states[1:], layers, labels)
            total = total + self.hidden_weight * hidden
        return StepLosses(total, cross_entropy, kl, hidden.detach())


def build_objective(job: Any, model: nn.Module, dtype: torch.dtype) -> Objective:
    """The objective of `job` for its sharded `model`, its teacher on the same mesh. Collective.

    Args:
        dtype: what the teacher computes in.
    """
    name = job.distill.teacher
    teacher = Teacher.build(resolve(name), mesh_of(model), dtype) if name else None
    return Objective(model, job.distill, teacher)


def mesh_of(model: nn.Module) -> DeviceMesh:
    """The mesh over which FSDP2 shards `model`."""
    return next(p.device_mesh for p in model.parameters() if isinstance(p, DTensor))


def next_token_loss(model: nn.Module, inputs: Mapping[str, Any], labels: Tensor) -> Tensor:
    """Cross entropy summed over the tokens of a batch, in nats, differentiable.

    The logits exist a chunk at a time only (`flame.training.chunked_loss`).

    Args:
        model: a causal language model, plain or sharded by `flame.model.shard`.
        inputs: the loader's: `input` `[B, T]`, and `cu_seqlens` for packed documents.
        labels: `[B, T]`, the token after each; −100 has no loss.
    """
    states = run_headless(model, inputs).logits
    total, _, _ = chunked_losses(states, Projection.of(output_head(model)), labels)
    return total


def hidden_distance(student: Sequence[Tensor], teacher: Sequence[Tensor], labels: Tensor) -> Tensor:
    """`H` of the module docstring, summed over tokens; differentiable in the student's states.

    Args:
        student, teacher: states `[B, T, D]` of each layer, as many and as wide in both.
        labels: `[B, T]`.
    """
    distances = [
        _RelativeDistance.apply(own, other, labels)
        for own, other in zip(student, teacher, strict=True)
    ]
    return torch.stack(distances).mean()


class _RelativeDistance(torch.autograd.Function):
    """`Σ ‖s − t‖² / ‖t‖²` over the tokens; keeps the gradient alone, in the dtype of `s`."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        precise = torch.promote_types(student.dtype, torch.float32)
        target = teacher.to(precise)
        difference = student.to(precise) - target
        lengths = target.square().sum(-1).clamp_min(torch.finfo(precise).tiny)
        weights = (labels != IGNORE_INDEX).to(precise) / lengths
        ctx.save_for_backward((2 * difference * weights[..., None]).to(student.dtype))
        return (difference.square().sum(-1) * weights).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return times(gradient, scale), None, None
