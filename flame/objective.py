"""What a training step minimises, as a sum over tokens, from the hidden states of the model."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from flame.chunked_loss import Projection, chunked_losses
from flame.errors import UserError


@dataclass(frozen=True)
class StepLosses:
    """Losses of one micro-batch, each a scalar: the sum over this rank's tokens, in nats."""

    total: Tensor
    """What is minimised; differentiable. The others are its parts, unweighted, and detached."""
    cross_entropy: Tensor
    kl: Tensor
    """T² · KL from the teacher; 0 without one."""
    hidden: Tensor
    """Distance of the hidden states from the teacher's; 0 where it is not asked for."""


def next_token_loss(model: nn.Module, inputs: Mapping[str, Any], labels: Tensor) -> Tensor:
    """Cross entropy summed over the tokens of a batch, in nats, differentiable.

    The logits exist a chunk at a time only (`flame.chunked_loss`).

    Args:
        model: a causal language model, plain or sharded by `flame.model.shard`.
        inputs: the loader's: `input` `[B, T]`, and `cu_seqlens` for packed documents.
        labels: `[B, T]`, the token after each; −100 has no loss.
    """
    states = last_hidden(model, inputs)
    total, _, _ = chunked_losses(states, Projection.of(output_head(model)), labels)
    return total


def last_hidden(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """What the model's output projection would be given: `[B, T, D]`. Runs all of `forward`."""
    return run_headless(model, inputs).logits


def run_headless(model: nn.Module, inputs: Mapping[str, Any], **options: Any) -> Any:
    """The model's output with the hidden states themselves in the place of `logits`.

    FSDP2's hooks sit on the model, so its own `forward` must run. They leave the root group, with
    the output projection in it, gathered until the backward pass is over.
    """
    given = dict(inputs)
    with _passing_through(output_head(model)) as seen:
        output = model(input_ids=given.pop("input"), use_cache=False, **given, **options)
    if not seen or output.logits is not seen[-1]:
        raise UserError(
            f"{type(model).__name__} changes its logits after the output projection: its loss "
            "cannot be taken in chunks"
        )
    return output


def output_head(model: nn.Module) -> nn.Module:
    """The module that projects hidden states to logits: an `nn.Linear`, tied or not."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    if not isinstance(head, nn.Linear):
        raise UserError(
            f"{type(model).__name__} has {type(head).__name__} for its output projection: "
            "a plain linear layer is needed"
        )
    return head


@contextmanager
def _passing_through(head: nn.Module) -> Iterator[list[Tensor]]:
    """Let `head` return what it is given, and note that down."""
    seen: list[Tensor] = []

    def forward(states: Tensor) -> Tensor:
        seen.append(states)
        return states

    head.forward = forward  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        del head.forward
