"""What a training step minimises, as a sum over tokens.

    total = ce_weight · CE + weight · T² · KL(teacher ‖ student) + hidden_weight · H

`CE` is the cross entropy with the next token. `KL` compares the teacher's and the student's
distributions of the next token, both with logits divided by the temperature `T` (T² keeps the size
of the gradient). `H` is the squared distance of a layer's output from the teacher's over the
squared length of the teacher's, averaged over the layers; the last layer's is taken after the final
norm. Tokens with the label −100 count in none of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from flame.checkpoint.reference import resolve
from flame.recovery.distill import Teacher
from flame.training.headless import output_head, run_headless
from flame.training.losses.chunked import Projection, chunked_losses
from flame.training.losses.hidden_distance import hidden_distance
from flame.training.losses.tokens import Mix


@dataclass(frozen=True)
class StepLosses:
    """Losses of one micro-batch, each a scalar summed over this rank's tokens."""

    total: Tensor
    """What is minimised, differentiable. The others are its parts, unweighted and detached."""
    cross_entropy: Tensor
    """In nats."""
    kl: Tensor
    """T² · KL from the teacher, in nats; 0 without one."""
    hidden: Tensor
    """H, the relative squared distance from the teacher's states; 0 if its weight is 0."""


class Objective:
    """The loss of one run.

    Args:
        model: the student, plain or sharded by `flame.model.shard`.
        distill: recipe section `[distill]` (`flame.config.Distill`).
        teacher: None for training on the text alone; `distill`'s weights are ignored then.
    """

    def __init__(self, model: nn.Module, distill: Any, teacher: Teacher | None = None) -> None:
        self.model, self.teacher = model, teacher
        self.chunk_tokens = distill.chunk_tokens
        self.hidden_weight = distill.hidden_weight if teacher else 0.0
        self.mix = Mix(distill.ce_weight, distill.weight, distill.temperature) if teacher else Mix()

    def __call__(self, inputs: Mapping[str, Any], labels: Tensor) -> StepLosses:
        """Compute the losses of a batch; arguments are as in `next_token_loss`. Collective."""
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
    """Build the objective of `job` for its sharded `model`. Collective.

    The teacher is sharded over the model's mesh and computes in `dtype`.
    """
    name = job.distill.teacher
    teacher = Teacher.build(resolve(name), mesh_of(model), dtype) if name else None
    return Objective(model, job.distill, teacher)


def mesh_of(model: nn.Module) -> DeviceMesh:
    """Return the mesh over which FSDP2 shards `model`."""
    return next(p.device_mesh for p in model.parameters() if isinstance(p, DTensor))


def next_token_loss(model: nn.Module, inputs: Mapping[str, Any], labels: Tensor) -> Tensor:
    """Return the cross entropy of a batch summed over its tokens, in nats, differentiable.

    Logits exist for one chunk of tokens at a time (`flame.training.losses`).

    Args:
        model: a causal language model, plain or sharded by `flame.model.shard`.
        inputs: as the loader gives them: `input` `[B, T]`, and `cu_seqlens` for packed documents.
        labels: `[B, T]`, the token after each; −100 has no loss.
    """
    states = run_headless(model, inputs).logits
    total, _, _ = chunked_losses(states, Projection.of(output_head(model)), labels)
    return total
