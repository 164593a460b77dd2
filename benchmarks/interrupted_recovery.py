"""Recovery with a teacher, interrupted by SIGTERM and resumed, beside one that runs through.

    python -m benchmarks.interrupted_recovery DENSE PRUNED [--steps 20] [--nproc 1] [--json FILE]

DENSE and PRUNED are model references; the text is Python's standard library. Three jobs of the same
LoRA recovery: one runs through, one gets SIGTERM after a few steps and is started again by the same
command line, one saves in the background. The table has their exit statuses, seconds, and the loss
at the last step, which must agree: `difference` is to the job that ran through.
"""

import argparse
import json
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.train_speed import last_line
from launch.drawing.table import Column, Table
from launch.reporting.losses import loss_curve

COLUMNS = (
    Column("job", align="left"),
    Column("statuses", "exit statuses", align="left"),
    Column("stopped", "stopped after step"),
    Column("seconds", "seconds", ",.1f"),
    Column("loss", "loss at the end", ".5f"),
    Column("difference", "difference", ".1e"),
)
STOPPED = 128 + signal.SIGTERM


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            job("runs through", options, Path(folder, "through")),
            job("SIGTERM, resumed", options, Path(folder, "stopped"), interrupt=True),
            job(
                "saves in the background", options, Path(folder, "async"),
                "--checkpoint.async_mode", "async",
            ),
        ]  # fmt: skip
    for row in rows:
        if "loss" in row and "loss" in rows[0]:
            row["difference"] = row["loss"] - rows[0]["loss"]
    print(Table(COLUMNS, rows).text())
    failures = [f"{row['job']}: {row['failed']}" for row in rows if "failed" in row]
    print("\n".join(failures), end="\n" * bool(failures))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    raise SystemExit(bool(failures))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("dense")
    add("pruned")
    add("--recipe", type=Path, default=Path("launch/recipes/demo_recover.toml"))
    add("--steps", type=int, default=20, help="of each job; at least 6")
    add("--seq-len", type=int, default=2048)
    add("--batch", type=int, default=16, help="sequences of a step")
    add("--nproc", type=int, default=1)
    add("--json", type=Path)
    return parser.parse_args()


def job(
    name: str, options: argparse.Namespace, folder: Path, *more: str, interrupt: bool = False
) -> dict[str, Any]:
    """Run one recovery to its end; return its row, with `failed` if it did not get there."""
    words = [
        "train", "--config", options.recipe, "--init", options.pruned,
        "--distill.teacher", options.dense, "--job.dump_folder", folder,
        "--training.steps", options.steps, "--training.seq_len", options.seq_len,
        "--training.global_batch_size", options.batch, "--metrics.log_freq", 1,
        "--checkpoint.interval", max(2, options.steps // 4), "--lora.no-merge", *more,
        "--nproc", options.nproc,
    ]  # fmt: skip
    line = [sys.executable, "-m", "launch.cli", *map(str, words)]
    print("$ slimstate", shlex.join(line[3:]), file=sys.stderr, flush=True)
    row: dict[str, Any] = {"job": name}
    begin = time.perf_counter()
    statuses = []
    if interrupt:
        statuses.append(stopped(line, folder, after=options.steps // 2))
        row["stopped"] = latest_step(folder)
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    statuses.append(done.returncode)
    row |= {"statuses": ", ".join(map(str, statuses)), "seconds": time.perf_counter() - begin}
    if statuses != [STOPPED] * interrupt + [0]:
        return {**row, "failed": last_line(done.stderr or done.stdout)}
    return {**row, "loss": loss_curve(folder)[1][-1]}


def stopped(line: list[str], folder: Path, after: int) -> int:
    """Start the job, send SIGTERM once it has logged step `after`; return its exit status."""
    log = folder.with_suffix(".log")
    with log.open("w") as file:
        process = subprocess.Popen(line, stdout=file, stderr=subprocess.STDOUT)
        while process.poll() is None and f"step: {after:2d}" not in log.read_text():
            time.sleep(0.05)
        process.terminate()
        return process.wait()


def latest_step(folder: Path) -> int | None:
    from flame.checkpoint.steps import latest_whole_step

    return latest_whole_step(folder / "checkpoint")


if __name__ == "__main__":
    main()
