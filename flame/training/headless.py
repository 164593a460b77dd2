"""Running a causal language model without its output projection."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from flame.errors import UserError


def run_headless(model: nn.Module, inputs: Mapping[str, Any], **options: Any) -> Any:
    """Return the model's output with the states before its output projection as `logits`.

    The model's own `forward` runs, since FSDP2's hooks sit there. They keep the root group, which
    holds the output projection, gathered until the backward pass is over.

    Args:
        inputs: as the loader gives them: `input` `[B, T]`, and `cu_seqlens` for packed documents.
        options: more arguments of the model's `forward`.

    Raises:
        UserError: the model changes its logits after the output projection.
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
    """Return the `nn.Linear` that projects hidden states to logits; UserError if it is no such."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    if not isinstance(head, nn.Linear):
        raise UserError(
            f"{type(model).__name__} has {type(head).__name__} for its output projection: "
            "a plain linear layer is needed"
        )
    return head


@contextmanager
def _passing_through(head: nn.Module) -> Iterator[list[Tensor]]:
    """Make `head` return its input in the block; yield the list of its inputs."""
    seen: list[Tensor] = []

    def forward(states: Tensor) -> Tensor:
        # FSDP2 puts its hooks on what the model returns; a view can lose them.
        seen.append(states.clone() if states._is_view() else states)
        return seen[-1]

    head.forward = forward  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        del head.forward
