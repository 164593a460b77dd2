"""Local steps: one pruned layer, trained by itself to give the dense layer's output.

The loss is the squared error of the layer's output, over the mean of the dense outputs' squares.
A sequence is a forward and backward pass of its own, the gradients of a batch's sequences are
summed in float64 over the processes, and Adam's state and the tensors that it changes are float64
on every process: the layer computes in a copy of them. So every process holds the same layer, and
the number of processes changes no more than the last bits of float64 sums.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pruning.repair.layer_calls import LayerCall, first_tensor

BETAS = (0.9, 0.99)
"""Adam's decays: of a few hundred steps, the last hundred say how large gradients are."""
WARM_UP = 10
"""Steps until the rate is whole; from there it falls to zero as a cosine."""
LOOKS = 8
"""How often the held-out error is looked at, evenly over the steps."""
SMALLEST = 1e-3
"""A tensor's root mean square counts as at least this, or zeros could not change."""


@dataclass(frozen=True)
class Steps:
    """How a layer is trained."""

    steps: int
    lr: float
    """Of Adam, as a part of a tensor's root mean square."""
    batch: int
    """Sequences in a step."""
    train: int
    """The sequences 0 to `train` − 1 are trained on."""
    sequences: int
    """The others up to this number are held out."""
    shards: int
    """A multiple of the number of processes; sequence i lies on process i modulo that number."""
    seed: int


@dataclass(frozen=True)
class Outcome:
    """What became of a layer."""

    before: float
    """Squared error over the squares of the dense output, on held-out tokens, before any step."""
    after: float
    """The same with the tensors that were best, which the layer has now."""
    step: int
    """Steps after which they were; 0 if none helped, and the layer is what it was."""


def fit(mixer: nn.Module, call: Callable[[int], LayerCall | None], how: Steps) -> Outcome:
    """Train `mixer` in place, and keep the tensors of the least held-out error. Collective.

    Args:
        mixer: the pruned layer, the same on every process.
        call: the dense layer's call on a sequence, None if it is another process's.
        how: steps, rate and data, the same on every process.
    """
    computing = list(mixer.parameters())
    masters = [nn.Parameter(p.detach().double()) for p in computing]
    groups = [{"params": [p], "lr": how.lr * _size(p)} for p in masters]
    optimizer = torch.optim.Adam(groups, betas=BETAS)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, how.steps))
    held_out = range(how.train, how.sequences)
    before = least = _error(mixer, call, held_out)
    best, at = [p.detach().clone() for p in computing], 0
    looks = {-(-how.steps * look // LOOKS) for look in range(1, LOOKS + 1)}
    for step, batch in zip(range(1, how.steps + 1), batches(how), strict=False):
        gradients = _gradients(mixer, call, batch)
        for master, gradient in zip(masters, gradients, strict=True):
            master.grad = gradient
        optimizer.step()
        schedule.step()
        _copy(masters, computing)
        if step in looks and (error := _error(mixer, call, held_out)) < least:
            least, at = error, step
            best = [p.detach().clone() for p in computing]
    _copy(best, computing)
    return Outcome(before, least, at)


def batches(how: Steps) -> Iterator[list[int]]:
    """The sequences of each step without end, drawn anew each time all have been taken.

    Sequences change places only with those that lie on the same process at every world size, so
    that a batch is spread over the processes as evenly as it can be.
    """
    generator = torch.Generator().manual_seed(how.seed)
    left: list[int] = []
    while True:
        while len(left) < how.batch:
            left += _shuffled(how, generator)
        yield left[: how.batch]
        left = left[how.batch :]


def _shuffled(how: Steps, generator: torch.Generator) -> list[int]:
    order = [0] * how.train
    for first in range(min(how.shards, how.train)):
        own = torch.arange(first, how.train, how.shards)
        drawn = own[torch.randperm(len(own), generator=generator)]
        for place, sequence in zip(own.tolist(), drawn.tolist(), strict=True):
            order[place] = sequence
    return order


def _gradients(
    mixer: nn.Module, call: Callable[[int], LayerCall | None], batch: Sequence[int]
) -> list[Tensor]:
    """Gradients of the batch's loss, float64, on every process."""
    mixer.train()
    parameters = list(mixer.parameters())
    sums = [torch.zeros_like(p, dtype=torch.float64) for p in parameters]
    for given in filter(None, map(call, batch)):
        wide = torch.promote_types(given.output.dtype, torch.float32)
        wanted = given.output.to(wide)
        error = first_tensor(mixer(*given.args, **given.kwargs)).to(wide) - wanted
        loss = error.square().sum() / wanted.square().sum()
        found = torch.autograd.grad(loss / len(batch), parameters, allow_unused=True)
        for total, gradient in zip(sums, found, strict=True):
            if gradient is not None:
                total += gradient
    flat = _summed(torch.cat([total.flatten() for total in sums]))
    parts = flat.split([p.numel() for p in parameters])
    return [part.view_as(p) for part, p in zip(parts, parameters, strict=True)]


@torch.no_grad()
def _error(
    mixer: nn.Module, call: Callable[[int], LayerCall | None], sequences: Sequence[int]
) -> float:
    """Squared error over the squares of the dense output, of all processes' sequences."""
    mixer.eval()
    sums = torch.zeros(2, dtype=torch.float64)
    for given in filter(None, map(call, sequences)):
        wanted = given.output.double()
        output = first_tensor(mixer(*given.args, **given.kwargs)).double()
        sums += torch.stack([(output - wanted).square().sum(), wanted.square().sum()]).cpu()
    error, whole = _summed(sums.to(next(mixer.parameters()).device)).tolist()
    return error / whole


def _summed(values: Tensor) -> Tensor:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def _size(tensor: Tensor) -> float:
    return max(float(tensor.detach().square().mean().sqrt()), SMALLEST)


def _rate(step: int, steps: int) -> float:
    return min((step + 1) / WARM_UP, 1.0) * (1 + math.cos(math.pi * step / steps)) / 2


@torch.no_grad()
def _copy(source: Sequence[Tensor], target: Sequence[Tensor]) -> None:
    for new, old in zip(source, target, strict=True):
        old.copy_(new)
