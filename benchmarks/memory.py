"""The most that a rank holds and reads in each stage, measured beside a bound; and for real models.

    python -m benchmarks.memory [--models dense experts] [--nproc 1 2 4] [--configs CONFIG …]

Models as deep as Qwen3.5-27B and Qwen3.5-35B-A3B, with the same tensors and narrow, go from a
Hugging Face folder through calibration, plans, repair, `apply` and both conversions, on real
processes (`benchmarks.memory_stages`); resident memory is the system's figure. Then the same bounds
(`benchmarks.memory_formulas`) for the `config.json` of real models, on a node of 8 GPUs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.memory_formulas import Sizes, bounds, resident
from benchmarks.peak_rss import RETURNS_MEMORY
from launch.drawing.table import Column, Table

FOLDER = "SLIMSTATE_MEMORY_FOLDER"
"""Environment variable: where the processes of a job meet."""
MODEL = "SLIMSTATE_MEMORY_MODEL"
COLUMNS = (
    Column("model", align="left"),
    Column("ranks", "ranks", ","),
    Column("stage", align="left"),
    Column("model_size", "model, MiB", ",.0f"),
    Column("share", "fp32 share of a rank, MiB", ",.0f"),
    Column("peak", "most held, MiB", ",.0f"),
    Column("bound", "bound, MiB", ",.0f"),
    Column("read", "read by a rank, MiB", ",.0f"),
)
WORKED = (
    Column("model", align="left"),
    Column("stage", align="left"),
    Column("size", "bf16 model, GiB", ",.1f"),
    Column("bound", "a rank of 8 holds at most, GiB", ",.1f"),
    Column("where", align="left"),
)
RANKS, TOKENS = 8, 2048
ON_GPU = ("load", "calibrate", "calibrate for the repair")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=["dense", "experts"])
    parser.add_argument("--nproc", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--configs", type=Path, nargs="*", default=[])
    options = parser.parse_args()
    if "RANK" in os.environ:
        work()
        return
    if options.models and options.nproc:
        with tempfile.TemporaryDirectory() as name:
            rows = list(measured_rows(options.models, options.nproc, Path(name)))
        print(Table(COLUMNS, rows).text(), end="\n\n", flush=True)
    if options.configs:
        worked = [row for file in options.configs for row in worked_rows(file)]
        print(Table(WORKED, worked).text())


def measured_rows(models: list[str], nproc: list[int], folder: Path) -> Iterator[dict[str, Any]]:
    from benchmarks import memory_stages

    memory_stages.write_text(folder / "text")
    for model in models:
        sizes = Sizes(memory_stages.MODELS[model])
        for ranks in nproc:
            bound = bounds(sizes, ranks, memory_stages.TOKENS, width=4)
            for stage, (peak, read) in started(model, ranks, folder).items():
                size = {"model_size": sizes.stored, "share": resident(sizes, ranks)}
                size |= {"peak": peak, "bound": bound[stage], "read": read}
                row = {"model": model, "ranks": ranks, "stage": stage}
                yield row | {name: value / 2**20 for name, value in size.items()}


def started(model: str, ranks: int, folder: Path) -> dict[str, tuple[int, int]]:
    """Run every stage on real processes."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    given = {FOLDER: str(folder), MODEL: model}
    environment = {"OMP_NUM_THREADS": "1", **os.environ, **RETURNS_MEMORY, **given}
    words = [sys.executable, *command, "-m", "benchmarks.memory"]
    subprocess.run(words, check=True, env=environment, stdout=subprocess.DEVNULL)
    return json.loads((folder / "found.json").read_text())


def work() -> None:
    """One process of such a job; rank 0 writes what all have found."""
    from benchmarks.memory_stages import MODELS, measured
    from flame.process.distributed import process_group, rank, world_size
    from flame.process.peers import on_first

    folder, model = Path(os.environ[FOLDER]), os.environ[MODEL]
    with process_group():
        own = folder / f"{model}-{world_size()}"
        on_first(own.mkdir)
        found = measured(MODELS[model], own, folder / "text")
        if rank() == 0:
            (folder / "found.json").write_text(json.dumps(found))


def worked_rows(file: Path) -> Iterator[dict[str, Any]]:
    sizes = Sizes(json.loads(file.read_text()))
    for stage, bound in bounds(sizes, RANKS, TOKENS, width=2).items():
        where = "each GPU" if stage in ON_GPU else "host, rank 0 alone"
        row = {"model": file.stem, "stage": stage, "where": where}
        yield row | {"size": sizes.stored / 2**30, "bound": bound / 2**30}


if __name__ == "__main__":
    main()
