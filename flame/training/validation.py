"""The loss on held-out text while a run trains."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from flame.data.heldout import Heldout, heldout_sequences
from flame.data.packing import IGNORE_INDEX
from flame.process.dealing import turns
from flame.process.distributed import gather_objects, world_size
from flame.training.objective import next_token_loss


@dataclass(frozen=True)
class Validated:
    """What a pass over held-out text gives."""

    loss: float
    """Mean cross entropy of a predicted token, in nats."""
    bits_per_byte: float
    tokens: int
    """Predicted tokens, over all ranks."""


class Validation:
    """Measures a run's model on the held-out text of its recipe, the same rows each time.

    Each row is computed by itself and the rows are summed in their order, so the figure does not
    depend on the number of processes, but for the rounding of their forward passes.

    Args:
        job: the job; section `[validation]` says when and how much.
        model: sharded by FSDP2.
        tokenizer: the run's.
        to_device: moves a tensor to where the model is, and returns other values as they are.
    """

    def __init__(
        self, job: Any, model: nn.Module, tokenizer: Any, to_device: Callable[[Any], Any]
    ) -> None:
        self.job, self.model, self.tokenizer = job, model, tokenizer
        self.to_device = to_device

    def due(self, step: int) -> bool:
        """Whether step `step` is the first, the last or a `freq`-th, and validation is on."""
        settings = self.job.validation
        regular = step in (1, self.job.training.steps) or step % settings.freq == 0
        return settings.enable and regular

    def log_if_due(self, step: int, monitor: Any) -> None:
        """Measure after step `step`, if it is due, and log it. Collective.

        The time that it takes counts as none of the training's.

        Args:
            step: the step that was done.
            monitor: torchtitan's `MetricsProcessor`.
        """
        if not self.due(step):
            return
        tokens, begin = monitor.ntokens_since_last_log, time.perf_counter()
        since = begin - monitor.time_last_log
        found = self.measure()
        monitor.ntokens_since_last_log = found.tokens // world_size()
        monitor.time_last_log = begin
        extra = {"validation_metrics/bits_per_byte": found.bits_per_byte}
        monitor.log_validation(found.loss, step, extra)
        monitor.ntokens_since_last_log = tokens
        monitor.time_last_log = time.perf_counter() - since

    @torch.no_grad()
    def measure(self) -> Validated:
        """Return the model's loss now. Collective; the model is in training mode afterwards."""
        self.model.eval()
        own = []
        for turn in turns(rows(self.job, self.tokenizer)):
            row = turn.item
            batch = {name: self.to_device(value) for name, value in row.inputs.items()}
            loss = next_token_loss(self.model, batch, self.to_device(row.labels))
            if turn.counts:
                tokens = int((row.labels != IGNORE_INDEX).sum())
                own.append((turn.number, float(loss), tokens, row.bytes))
        # The root group would stay gathered, and go on with these weights after the next update.
        assert isinstance(self.model, FSDPModule)
        self.model.reshard()
        self.model.train()
        _, losses, counts, sizes = zip(*sorted(chain(*gather_objects(own))), strict=True)
        total = math.fsum(losses)
        return Validated(
            total / max(sum(counts), 1),
            total / math.log(2) / max(sum(sizes), 1),
            sum(counts),
        )


def rows(job: Any, tokenizer: Any) -> Iterator[Heldout]:
    """Return an iterator over the held-out rows that `job` measures.

    Raises:
        UserError: the text is missing or empty, or the tokenizer is not a fast one.
    """
    batches, batch = job.validation.steps, job.training.global_batch_size
    most = None if batches < 0 else batches * batch
    return heldout_sequences(job.data, tokenizer, job.training.seq_len, most)
