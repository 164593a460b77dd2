"""The gradients of a step: when they are summed over the ranks, and their clipping.

FSDP2 reduces the gradients of what it shards. Parameters that it leaves whole on every rank
(`flame.model.full_precision_parameters`) get theirs summed here, all in one all-reduce.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from flame.process.distributed import world_size

ONCE = "once_a_step"
"""Value of `parallelism.reduce_gradients` that reduces after the last micro-batch alone."""

T = TypeVar("T")


def reducing(model: nn.Module, batches: Sequence[T], when: str) -> Iterator[T]:
    """Yield the micro-batches of a step, and let FSDP2 reduce gradients at those that `when` says.

    Args:
        model: sharded by FSDP2; the caller runs it forward and backward on each batch.
        when: `parallelism.reduce_gradients`. Until the last micro-batch of `once_a_step`, each
            rank holds the gradients of all sharded parameters in full.
    """
    assert isinstance(model, FSDPModule)
    for number, batch in enumerate(batches, 1):
        if when == ONCE:
            model.set_requires_gradient_sync(number == len(batches))
        yield batch


def replicated(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Return the trained parameters that FSDP2 does not shard, in their order."""
    return [p for p in parameters if p.requires_grad and not isinstance(p, DTensor)]


@torch.no_grad()
def sum_replicated_gradients(
    parameters: Sequence[nn.Parameter], group: dist.ProcessGroup | None = None
) -> None:
    """Sum the gradients of `parameters` over `group` (default: all) in one all-reduce. Collective.

    A rank whose tokens did not reach a parameter adds zeros. The gradients are views of one tensor
    afterwards.

    Args:
        parameters: whole on every rank and of one dtype, in the same order everywhere.
    """
    if world_size(group) == 1 or not parameters:
        return
    own = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([gradient.flatten() for gradient in own])
    dist.all_reduce(flat, group=group)
    parts = flat.split([gradient.numel() for gradient in own])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.grad = part.view_as(parameter)


@torch.no_grad()
def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    """Scale the gradients to a global 2-norm of at most `max_norm`; return the norm before.

    Sharded and replicated parameters are taken together. A replicated gradient is the same on every
    rank and counts once. Nothing is read on the host: the norm is a scalar of the device.
    """
    with_gradient = [p for p in parameters if p.grad is not None]
    sharded = [p for p in with_gradient if isinstance(p.grad, DTensor)]
    whole = [p for p in with_gradient if not isinstance(p.grad, DTensor)]
    norms = [_norm(part) for part in (sharded, whole) if part]
    total = torch.linalg.vector_norm(torch.stack(norms))
    for part in (sharded, whole):
        if part:
            torch.nn.utils.clip_grads_with_norm_(part, max_norm, total, foreach=True)
    return total


def _norm(parameters: list[nn.Parameter]) -> Tensor:
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters], foreach=True)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
