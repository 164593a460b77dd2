"""The figures of a training step, which the host reads one step late.

A host that reads a step's loss waits for the device, which then waits for the host's next work. So
a step leaves its figures on the device, copies them to the host without waiting, and the host reads
them when the device has the work of the next step.
"""

import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from flame.process.distributed import rank, world_size
from flame.training.step.batches import StepBatches

LOSSES = 4


@dataclass(frozen=True)
class Figures:
    """What is known of a step once the device has done it; the same on every rank."""

    losses: list[float]
    """Means over the tokens of all ranks: the total, cross entropy, KL and hidden distance."""
    gradient_norm: float
    """Before clipping."""
    worst: float
    """The largest of the ranks' mean losses."""
    finite: bool
    """Whether losses and norm are finite on every rank; otherwise the step changed nothing."""


def agreed(losses: Tensor, norm: Tensor, share: float) -> Tensor:
    """Return a step's figures as one tensor of the device, the last of them `finite`. Collective.

    Args:
        losses: this rank's sums over its tokens, divided by all ranks' tokens, `[4]`.
        norm: of the gradients.
        share: all ranks' tokens over this rank's.
    """
    own = torch.cat([losses, norm.to(losses)[None], share * losses[:1]])
    # Each rank's row is added to zeros: the sum is exact, and a value that is not finite stays so.
    every = own.new_zeros(world_size(), len(own))
    every[rank()] = own
    if world_size() > 1:
        dist.all_reduce(every)
    finite = every[:, : LOSSES + 1].isfinite().all()
    norm, worst = every[0, LOSSES], every[:, LOSSES + 1].max()
    parts = [norm, worst, finite.to(losses)]
    return torch.cat([every[:, :LOSSES].sum(0), torch.stack(parts)])


class Launched:
    """A step whose work the device has been given.

    Args:
        step: its number.
        rate: its learning rate.
        taken: this rank's batches.
        tokens: of all ranks' batches, whether they are predicted or not.
        tokens_seen: those of all steps up to this one.
        figures: from `agreed`.
    """

    def __init__(
        self,
        step: int,
        rate: float,
        taken: StepBatches,
        tokens: int,
        tokens_seen: int,
        figures: Tensor,
    ) -> None:
        self.step, self.rate, self.taken = step, rate, taken
        self.tokens, self.tokens_seen = tokens, tokens_seen
        self.ended = 0.0
        """When the device had done it, by `time.perf_counter`; a CPU has by now."""
        on_gpu = figures.is_cuda
        self._figures = torch.empty(len(figures), dtype=figures.dtype, pin_memory=on_gpu)
        self._figures.copy_(figures, non_blocking=True)
        self._copied = torch.cuda.Event() if on_gpu else None
        if self._copied is None:
            self.ended = time.perf_counter()
        else:
            self._copied.record()

    def read(self) -> Figures:
        """Wait until the device has done the step, and return its figures."""
        if self._copied is not None:
            self._copied.synchronize()
            self.ended = time.perf_counter()
        *losses, norm, worst, finite = self._figures.tolist()
        return Figures(losses, norm, worst, bool(finite))
