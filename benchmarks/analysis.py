"""Seconds that `slimstate analyze` takes for 2,048 tokens × 4 layers × 4 heads of 64 × 64.

    python -m benchmarks.analysis [--nproc 2] [--sequences 1,4]

The whole command, start and imports included, on a random GatedDeltaNet in a temporary folder.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from launch.drawing.table import Column, Table

CONFIG = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_heads": 4,
    "head_dim": 64,
    "expand_v": 1.0,
    "vocab_size": 512,
    "hidden_ratio": 2,
}
COLUMNS = (
    Column("sequences"),
    Column("tokens", "tokens each", ",d"),
    Column("processes"),
    Column("wall", "wall, s", ".1f"),
    Column("cpu", "CPU of all processes, s", ".1f"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument("--sequences", default="1,4")
    options = parser.parse_args()
    counts = [int(text) for text in options.sequences.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder) / "model")
        rows = [timed(Path(folder), count, options.nproc) for count in counts]
    print(Table(COLUMNS, rows).text())


def write_model(folder: Path) -> None:
    """A random model and a tokenizer of the standard library's source."""
    import torch
    from fla.models import GatedDeltaNetConfig, GatedDeltaNetForCausalLM

    from flame.data.corpus import stdlib_texts
    from flame.data.tokenizer import train_tokenizer

    torch.manual_seed(0)
    GatedDeltaNetForCausalLM(GatedDeltaNetConfig(**CONFIG)).save_pretrained(folder)
    train_tokenizer(stdlib_texts("heldout"), int(CONFIG["vocab_size"]), folder)


def timed(folder: Path, sequences: int, nproc: int) -> dict[str, float]:
    """Wall-clock seconds and CPU seconds of one run of the command."""
    command = [sys.executable, "-m", "launch.cli", "analyze"]
    command += [str(folder / "model"), str(folder / f"out-{sequences}")]
    command += ["--data", "python-stdlib", "--length", "2048"]
    command += ["--sequences", str(sequences), "--nproc", str(nproc)]
    start, before = time.monotonic(), children_cpu_seconds()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds, used = time.monotonic() - start, children_cpu_seconds() - before
    counts = {"sequences": sequences, "tokens": 2048, "processes": nproc}
    return {**counts, "wall": seconds, "cpu": used}


def children_cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
