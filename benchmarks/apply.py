"""Bytes per second that `slimstate apply` moves, beside those of `cp`, and its peak memory.

    python -m benchmarks.apply [--gigabytes 20] [--form dcp|hf] [--folder FOLDER] [--rounds 2]

Both get the same files, in turns and in one run: the source is dropped from the page cache before
each, and what was written is brought to the disk within the measured time. Bytes are the source's.
`apply` runs in a process of its own, whose imports are not timed and whose peak resident memory
is the system's figure. Everything that was written is removed at the end.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.checkpoints import write_checkpoint
from flame.errors import UserError, run_stage
from launch.drawing.table import Column, Table

COLUMNS = (
    Column("form", align="left"),
    Column("gigabytes", "GB", ".2f"),
    Column("cp", "cp, GB/s", ".3f"),
    Column("apply", "apply, GB/s", ".3f"),
    Column("ratio", "apply / cp", ".2f"),
    Column("peak", "peak RSS, MiB", ",.0f"),
    Column("bound", "1 GiB + 2 largest, MiB", ",.0f"),
)
NEEDED = 2.2
"""Free space that the source and one copy of it take, with a margin, in sizes of the source."""


@dataclass(frozen=True)
class Run:
    """One run of `apply`."""

    seconds: float
    peak_bytes: int


def main() -> None:
    run_stage(_main)


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--gigabytes", type=float, default=20.0)
    add("--form", choices=("dcp", "hf"), default="dcp")
    add("--folder", type=Path, help="where to write (default: the system's temporary folder)")
    add("--rounds", type=int, default=2)
    add("--work", nargs=3, metavar=("MODEL", "PLAN", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work is not None:
        work(*options.work)
        return
    check_space(options.folder, options.gigabytes)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        row = measured(Path(folder), options.gigabytes, options.form, options.rounds)
    print(Table(COLUMNS, [row]).text())


def check_space(folder: Path | None, gigabytes: float) -> None:
    """Raise UserError if the folder is missing or has no room."""
    place = folder or Path(tempfile.gettempdir())
    if not place.is_dir():
        raise UserError(f"--folder {place} is no folder")
    free = shutil.disk_usage(place).free / 1e9
    if free < NEEDED * gigabytes:
        raise UserError(
            f"{place} has {free:.1f} GB free, --gigabytes {gigabytes:g} takes "
            f"{NEEDED * gigabytes:.1f}: give another --folder, or fewer"
        )


def measured(folder: Path, gigabytes: float, form: str, rounds: int) -> dict[str, Any]:
    """The row of the table: medians of the rates, the highest peak."""
    model, largest = write_checkpoint(folder / "model", gigabytes, form)
    write_plan(model, folder / "plan.json")
    size = sum(file.stat().st_size for file in files_of(model))
    copies, runs = [], []
    for number in range(1, rounds + 1):
        copies.append(copy_seconds(model, folder / "copy"))
        runs.append(apply_run(model, folder / "plan.json", folder / "out"))
        print(f"round {number}: cp {copies[-1]:.2f} s, apply {runs[-1].seconds:.2f} s", flush=True)
    cp = size / 1e9 / statistics.median(copies)
    apply = size / 1e9 / statistics.median(run.seconds for run in runs)
    peak = max(run.peak_bytes for run in runs) / 2**20
    bound = 1024 + 2 * largest / 2**20
    rates = {"cp": cp, "apply": apply, "ratio": apply / cp}
    return {"form": form, "gigabytes": size / 1e9, **rates, "peak": peak, "bound": bound}


def write_plan(model: Path, file: Path) -> None:
    """A plan that halves the key channels by their weights."""
    command = [sys.executable, "-m", "launch.cli", "plan", str(model), str(file)]
    subprocess.run(
        [*command, "--method", "l1", "--ratio", "0.5"], check=True, stdout=subprocess.DEVNULL
    )


def copy_seconds(model: Path, copy: Path) -> float:
    """Seconds of `cp -r`, fsync of every file included."""
    with _written(copy), _cold(model):
        start = time.perf_counter()
        subprocess.run(["cp", "-r", str(model), str(copy)], check=True)
        sync(copy)
        return time.perf_counter() - start


def apply_run(model: Path, plan: Path, out: Path) -> Run:
    """One run of `apply` in a new process."""
    with _written(out), _cold(model):
        command = [sys.executable, "-m", "benchmarks.apply", "--work"]
        process = subprocess.Popen(
            [*command, str(model), str(plan), str(out)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        said = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise UserError(f"apply ended with status {process.returncode}")
        return Run(json.loads(said.splitlines()[-1]), usage.ru_maxrss * 1024)


def work(model: str, plan: str, out: str) -> None:
    """Apply a plan in this process; print the seconds that it took, the imports' left out."""
    from flame.checkpoint.convert import complete_config
    from flame.checkpoint.reference import resolve
    from pruning import apply  # noqa: F401  (imports what apply needs)
    from pruning.transform import write  # noqa: F401  (imports what apply needs)

    complete_config(resolve(model).config)  # imports the model's class
    options = apply.STAGE.parse([model, plan, out])
    apply.check(options)
    start = time.perf_counter()
    apply.run(options)
    sync(Path(out))
    print(time.perf_counter() - start, flush=True)


def sync(folder: Path) -> None:
    """Bring every file of `folder` to the disk."""
    for file in files_of(folder):
        with open(file, "rb") as stream:
            os.fsync(stream.fileno())


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@contextmanager
def _cold(model: Path) -> Iterator[None]:
    """Drop the files of `model` from the page cache first."""
    sync(model)
    for file in files_of(model):
        with open(file, "rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    yield


@contextmanager
def _written(folder: Path) -> Iterator[None]:
    """Remove `folder` at the end: two outputs need not fit on the disk together."""
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
