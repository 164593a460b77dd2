"""Speed and memory of `slimstate train` with a recipe, in variations of its settings.

    python -m benchmarks.train_speed [--recipe launch/recipes/delta_net_340M.toml]
        [--steps 16] [--tokens 65536] [--nproc 1] [--only base compile …] [--json FILE]

Each variation is a job of its own on Python's standard library, without checkpoints. Tokens a
second are the median over the steps after the first three and before the profiler's. On a GPU the
last two steps are traced: `idle` is the part of the time between their first and last kernel in
which no kernel runs, `gap` the longest such pause. `estimate` is what `--estimate` foresees and
`peak` what the allocator handed out. A variation that is refused or fails has a line of its own
under the table.
"""

import argparse
import contextlib
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flame.errors import UserError
from launch.drawing.table import Column, Table
from launch.reporting.losses import curve

VARIATIONS: dict[str, tuple[str, ...]] = {
    "base": (),
    "recompute": ("--activation_checkpoint.mode", "full"),
    "recompute every 2nd": ("--activation_checkpoint.mode", "selective"),
    "weights kept gathered": ("--parallelism.fsdp_reshard_after_forward", "never"),
    "half the local batch": (),
    "gradients once a step": ("--parallelism.reduce_gradients", "once_a_step"),
    "compile": ("--compile.enable",),
}
WARM_UP, TRACED = 3, 2
COLUMNS = (
    Column("variation", align="left"),
    Column("rate", "tokens/s a process", ",.0f"),
    Column("ratio", "÷ base", ".3f"),
    Column("idle", "GPU idle", ".1%"),
    Column("gap", "longest pause, ms", ".2f"),
    Column("peak", "peak, GiB", ".2f"),
    Column("estimate", "estimate, GiB", ".2f"),
)


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = Path(folder) / "tokenizer"
        slimstate("tokenizer", tokenizer, "--size", options.vocabulary)
        rows = [
            measured(name, options, tokenizer, Path(folder) / f"run{number}")
            for number, name in enumerate(options.only)
        ]
    base = next((row.get("rate") for row in rows if row["variation"] == "base"), None)
    for row in rows:
        row["ratio"] = row["rate"] / base if base and row.get("rate") else None
    print(Table(COLUMNS, rows).text())
    for row in rows:
        if "failed" in row:
            print(f"{row['variation']}: {row['failed']}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    if not any("rate" in row for row in rows):
        raise SystemExit(1)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--recipe", type=Path, default=Path("launch/recipes/delta_net_340M.toml"))
    add("--vocabulary", type=int, default=16000, help="of the tokenizer, at most the model's")
    add("--steps", type=int, default=16, help="of a job; at least 8")
    add("--tokens", type=int, default=65536, help="of a step and process")
    add("--seq-len", type=int, default=2048)
    add("--local-batch-size", type=int, default=16)
    add("--nproc", type=int, default=1)
    add("--only", nargs="+", choices=VARIATIONS, default=list(VARIATIONS))
    add("--json", type=Path)
    return parser.parse_args()


def measured(
    name: str, options: argparse.Namespace, tokenizer: Path, folder: Path
) -> dict[str, Any]:
    """The row of one variation."""
    local = options.local_batch_size
    if name == "half the local batch":
        local = max(1, local // 2)
    words = [
        "train", "--config", options.recipe, "--job.dump_folder", folder,
        "--data.dataset", "python-stdlib", "--data.no-streaming", "--data.tokenizer", tokenizer,
        "--training.steps", options.steps, "--training.seq_len", options.seq_len,
        "--training.local_batch_size", local,
        "--training.global_batch_size", options.nproc * options.tokens // options.seq_len,
        "--checkpoint.interval", 10**6, "--metrics.log_freq", 1, *VARIATIONS[name],
    ]  # fmt: skip
    row: dict[str, Any] = {"variation": name}
    with contextlib.suppress(UserError):
        row["estimate"] = total_gib(words, options.nproc)
    profile = (
        "--profiling.enable_profiling", "--profiling.profile_freq", options.steps - 1,
        "--profiling.profiler_warmup", 1, "--profiling.profiler_active", TRACED,
    )  # fmt: skip
    done = slimstate(*words, "--nproc", options.nproc, *(profile if has_gpu() else ()))
    if done.returncode:
        return {**row, "failed": last_line(done.stderr or done.stdout)}
    rates = list(curve(folder, "tokens_per_second").values())
    untraced = rates[WARM_UP : len(rates) - TRACED - 2]
    row["rate"] = statistics.median(untraced) / options.nproc
    peaks = curve(folder, "memory/max_active(GiB)")
    row["peak"] = max(peaks.values()) if has_gpu() and peaks else None
    for file in folder.glob("profile_traces/**/rank0_trace.json"):
        row |= idleness(json.loads(file.read_text())["traceEvents"])
    return row


def slimstate(*words: object) -> subprocess.CompletedProcess[str]:
    """Run a command of this project, in a process of its own."""
    line = [sys.executable, "-m", "launch.cli", *map(str, words)]
    print("$ slimstate", shlex.join(line[3:]), file=sys.stderr, flush=True)
    return subprocess.run(line, capture_output=True, text=True, check=False)


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it said nothing"])[-1]


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def total_gib(words: Sequence[object], nproc: int) -> float:
    """The total that `slimstate train … --estimate` gives; UserError for a wrong recipe."""
    from flame.train import STAGE, answer

    table = answer(STAGE.parse([*map(str, words[1:]), "--estimate"]), nproc, 1) or ""
    return next(float(line.split()[1]) for line in table.splitlines() if line.startswith("total"))


def idleness(events: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """`idle`, a part of 1, and `gap`, in milliseconds, of a trace of PyTorch's profiler."""
    spans = sorted(
        (event["ts"], event["ts"] + event["dur"])
        for event in events
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    )
    return _idleness(spans) if spans else {}


def _idleness(spans: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Of intervals in microseconds, sorted by their begin; they may overlap."""
    start, end = spans[0]
    pauses = [0.0]
    for begin, finish in spans:
        pauses.append(max(0.0, begin - end))
        end = max(end, finish)
    return {"idle": sum(pauses) / max(end - start, 1e-9), "gap": max(pauses) / 1000}


if __name__ == "__main__":
    main()
