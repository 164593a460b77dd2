"""What `train` costs beside a bare FSDP2 loop over the same model and batches.

    python -m benchmarks.train_overhead [--nproc 1 2] [--steps 10] [--rounds 9]

The bare loop is what a person would write: the model under `fully_shard`, cross entropy of the full
logits, `clip_grad_norm_`, AdamW, a schedule; its batches lie in memory, those of `train` come from
its loader. Neither saves checkpoints. In each round both train on the same batches, in turn and
in changing order, so that they meet the same load. The ratio is of the median over the rounds of
the wall time; beside it the ratio of CPU time, which other programs disturb less.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from launch.drawing.table import Column, Table

FOLDER = "SLIMSTATE_OVERHEAD_FOLDER"
"""Environment variable: where the processes of a job meet."""
RECIPE = Path("launch/recipes/demo_pretrain.toml")
COLUMNS = (
    Column("processes"),
    Column("tokens", "tokens a step", ","),
    Column("bare", "bare loop, s a step", ".4f"),
    Column("train", "train, s a step", ".4f"),
    Column("ratio", "train : bare", ".3f"),
    Column("cpu_ratio", "of CPU time", ".3f"),
)


@dataclass
class Clock:
    """Seconds of each round, on the wall and of this process's CPU."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def time(self, work: Callable[[], None]) -> None:
        import torch

        def finish() -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()

        finish()
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        finish()
        self.wall.append(time.perf_counter() - wall)
        self.cpu.append(time.process_time() - cpu)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nproc", type=int, nargs="+", default=[1, 2], help="processes to try")
    parser.add_argument("--steps", type=int, default=10, help="steps of a measurement")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--local-batch-size", type=int, default=2, help="sequences a process")
    parser.add_argument("--seq-len", type=int, default=512)
    options = parser.parse_args()
    if "RANK" in os.environ:
        measure(options)
        return
    rows = [started(processes, options) for processes in options.nproc]
    print(Table(COLUMNS, rows).text())


def started(processes: int, options: argparse.Namespace) -> dict[str, Any]:
    """The row of one number of processes, from a job of its own."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    with tempfile.TemporaryDirectory() as folder:
        environment = {"OMP_NUM_THREADS": "1", **os.environ, FOLDER: folder}
        # torchrun takes --nproc for its own, wherever it stands.
        settings = {key: value for key, value in vars(options).items() if key != "nproc"}
        own = [f"--{key.replace('_', '-')}={value}" for key, value in settings.items()]
        words = [sys.executable, *command, "-m", "benchmarks.train_overhead", *own]
        subprocess.run(words, check=True, env=environment)
        return json.loads(Path(folder, "row.json").read_text())


def measure(options: argparse.Namespace) -> None:
    """Time both loops; rank 0 writes the row."""
    import flame.register  # noqa: F401
    from flame.process.distributed import process_group, rank, world_size

    folder = Path(os.environ[FOLDER])
    with process_group():
        ours, bare = loops(options, folder)
        clocks = {"train": Clock(), "bare": Clock()}
        for position in range(options.rounds + 1):
            order = [("train", ours), ("bare", bare)]
            for name, loop in order if position % 2 else reversed(order):
                # The first round warms both up.
                (clocks[name] if position else Clock()).time(partial(loop, options.steps))
        row = {"processes": world_size(), **medians(clocks, options.steps)}
        row["tokens"] = world_size() * options.local_batch_size * options.seq_len
        if rank() == 0:
            (folder / "row.json").write_text(json.dumps(row))


def medians(clocks: dict[str, Clock], steps: int) -> dict[str, float]:
    wall = {name: statistics.median(clock.wall) / steps for name, clock in clocks.items()}
    ratios = [a / b for a, b in zip(clocks["train"].wall, clocks["bare"].wall, strict=True)]
    cpu = [a / b for a, b in zip(clocks["train"].cpu, clocks["bare"].cpu, strict=True)]
    return {**wall, "ratio": statistics.median(ratios), "cpu_ratio": statistics.median(cpu)}


def loops(options: argparse.Namespace, folder: Path) -> tuple[Any, Any]:
    """Both loops, each as a function of the number of steps."""
    from flame.process.stop_signals import StopSignals
    from flame.training.trainer import Trainer

    job = demo_job(options, folder)
    trainer: Any = Trainer(job)
    trainer.checkpointer = _NoCheckpoints()
    trainer._shorten_timeouts = lambda: None
    batches = list(islice(iter(trainer.dataloader), 64))
    bare = bare_loop(job, batches)

    def train(steps: int) -> None:
        job.training.steps = trainer.step + steps
        trainer._steps(StopSignals(), [])

    return train, bare


def demo_job(options: argparse.Namespace, folder: Path) -> Any:
    """The demo's recipe with this benchmark's batch, for a number of steps that is not reached."""
    from flame.config import job_from_tables
    from flame.data.corpus import stdlib_texts
    from flame.data.tokenizer import train_tokenizer
    from flame.process.distributed import barrier, rank, world_size
    from flame.recipe import read_tables

    if rank() == 0:
        texts = stdlib_texts("train")[:300]
        train_tokenizer(texts, 4096, folder / "tokenizer")
    barrier()
    job = job_from_tables(read_tables(RECIPE))
    job.job.dump_folder = str(folder / "run")
    job.data.tokenizer = str(folder / "tokenizer")
    job.training.seq_len = options.seq_len
    job.training.local_batch_size = options.local_batch_size
    job.training.global_batch_size = options.local_batch_size * world_size()
    job.lr_scheduler.total_steps = 10**6
    return job


def bare_loop(job: Any, batches: list[Any]) -> Callable[[int], None]:
    """The loop that a person would write, over `batches` again and again."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor
    from transformers import AutoModelForCausalLM

    from flame.model import layers, stock_config
    from flame.process.distributed import device_type, local_device, world_size
    from flame.run_folder.origin import model_config
    from flame.training.step.gradients import sum_replicated_gradients

    device = local_device()
    torch.manual_seed(0)
    config = stock_config(model_config(job))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(device)
    mesh = init_device_mesh(device_type(), (world_size(),))
    small = [p for n, p in model.named_parameters() if n.endswith(("A_log", "dt_bias"))]
    for module in [*layers(model), model]:
        fully_shard(module, mesh=mesh, ignored_params=set(small))
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    sharded = [p for p in model.parameters() if isinstance(p, DTensor)]
    groups: list[dict[str, Any]] = [{"params": sharded}, {"params": small}]
    optimizer = torch.optim.AdamW(groups, lr=2e-3, weight_decay=0.1, foreach=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: (1 + math.cos(math.pi * step / 10**6)) / 2
    )
    model.train()
    source = _endless(batches)

    def run(steps: int) -> None:
        for inputs, labels in islice(source, steps):
            given = {name: value.to(device) for name, value in inputs.items()}
            labels = labels.to(device)
            logits = model(input_ids=given.pop("input"), use_cache=False, **given).logits
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
            )
            (loss / (labels.numel() * world_size())).backward()
            sum_replicated_gradients(small)
            torch.nn.utils.clip_grad_norm_(sharded, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

    return run


def _endless(batches: list[Any]) -> Iterator[Any]:
    while True:
        yield from batches


class _NoCheckpoints:
    """Saves nothing: the bare loop does not either."""

    def due(self, step: int) -> bool:
        return False

    def save(self, curr_step: int, last_step: bool = False) -> None: ...


if __name__ == "__main__":
    main()
