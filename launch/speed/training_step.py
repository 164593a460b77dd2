"""One training step: its time and its memory."""

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from launch.speed.decoding import random_prompt
from launch.speed.peak_memory import peak_bytes
from launch.speed.timing import Spread, take_turns, timed
from launch.speed.workload import Measure, Models, Workload, bytes_of, enough_memory, weight_bytes


def training(models: Models, work: Workload, compute: torch.dtype) -> Iterator[Measure]:
    """Milliseconds and peak memory of one training step: forward, backward, AdamW.

    The learning rate is 0, so the weights stay; they are fp32, and matrix products run in
    `compute` where that is narrower.
    """
    sizes = {"batch_size": work.train_batch, "length": work.train_length}
    where = f"{work.train_batch} × {work.train_length:,} tokens"
    steps = {name: TrainingStep(model, work, compute) for name, model in models.items()}
    with enough_memory(f"a training step of {where}", "--train-batch or --train-length"):
        seconds = take_turns({n: step.timed for n, step in steps.items()}, work.repeats)
        peaks = {name: Spread.counted(step.peak_bytes()) for name, step in steps.items()}
    rows = {name: Spread.milliseconds(times) for name, times in seconds.items()}
    yield Measure("train_step", f"training step, {where}", "ms", "lower", rows, sizes)
    label = f"peak memory, training step, {where}"
    yield Measure("train_peak_bytes", label, "bytes", "lower", peaks, sizes)


class TrainingStep:
    """One step of AdamW on random tokens, again and again."""

    def __init__(self, model: nn.Module, work: Workload, compute: torch.dtype) -> None:
        self.model = model.train()
        self.compute = compute
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
        tokens = random_prompt(model, work.train_batch, work.train_length + 1, work.seed)
        self.inputs, self.labels = tokens[:, :-1].contiguous(), tokens[:, 1:].flatten()

    @property
    def device(self) -> torch.device:
        return self.inputs.device

    def __call__(self) -> None:
        narrow = self.compute != torch.float32
        with torch.autocast(self.device.type, self.compute, enabled=narrow):
            logits = self.model(input_ids=self.inputs, use_cache=False).logits
        cross_entropy(logits.flatten(0, 1).float(), self.labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def timed(self) -> float:
        return timed(self, self.device)

    def peak_bytes(self) -> int:
        """Weights, moments, and what a step holds on top of them; call after a first step."""
        moments = [v for state in self.optimizer.state.values() for v in state.values()]
        return weight_bytes(self.model) + bytes_of(moments) + peak_bytes(self, self.device)
