"""Seconds that strong RRQR takes for all heads of a model, from Gram matrices to kept channels.

    python -m benchmarks.selection [--layers 24] [--heads 16] [--channels 128] [--keep 64]

All heads are one batch. The matrices are Gram matrices of random activations, `2 · channels` rows.
"""

import argparse
import statistics
import time

import torch

from launch.table import Column, Table
from pruning.linalg import strong_rrqr

COLUMNS = (
    Column("heads", "heads", ",d"),
    Column("channels"),
    Column("keep"),
    Column("threads"),
    Column("least", "least, s", ".3f"),
    Column("median", "median, s", ".3f"),
    Column("cpu", "CPU, s", ".3f"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--layers", type=int, default=24)
    add("--heads", type=int, default=16)
    add("--channels", type=int, default=128)
    add("--keep", type=int, default=64)
    add("--threads", type=int, default=1)
    add("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(0)
    heads, channels = options.layers * options.heads, options.channels
    rows = torch.randn(heads, 2 * channels, channels, dtype=torch.float64, generator=generator)
    gram = rows.mT @ rows
    seconds, cpu = [], []
    for _ in range(options.rounds):
        start, start_cpu = time.perf_counter(), time.process_time()
        strong_rrqr(gram, options.keep)
        seconds.append(time.perf_counter() - start)
        cpu.append(time.process_time() - start_cpu)
    row = {
        "heads": heads,
        "channels": channels,
        "keep": options.keep,
        "threads": options.threads,
        "least": min(seconds),
        "median": statistics.median(seconds),
        "cpu": min(cpu),
    }
    print(Table(COLUMNS, [row]).text())


if __name__ == "__main__":
    main()
