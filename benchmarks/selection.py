"""Seconds that strong RRQR takes for all heads of a model, and the straightforward way's beside it.

    python -m benchmarks.selection [--layers 24] [--heads 16] [--channels 128] [--keep 64]

Ours is timed from Gram matrices in memory, as saved statistics hold them, to kept channels; reading
that many from a file is timed by itself. The straightforward way takes 5,000 rows of activations,
QR with pivoting of scipy, and a new factorisation for every exchange; it is timed on a few heads
and scaled up. Those heads' Gram matrices are of the same rows: both must keep the same channels.
Beside the clock's ratio stands that of processor seconds, which others' work does not disturb.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from launch.drawing.table import Column, Table
from pruning.linalg import strong_rrqr

COLUMNS = (
    Column("heads", "heads", ",d"),
    Column("channels"),
    Column("keep"),
    Column("threads"),
    Column("least", "least, s", ".3f"),
    Column("median", "median, s", ".3f"),
    Column("cpu", "CPU, s", ".3f"),
    Column("reading", "reading, s", ".3f"),
    Column("naive", "straightforward, s", ",.0f"),
    Column("ratio", "times least", ",.0f"),
    Column("cpu_ratio", "times, CPU", ",.0f"),
    Column("same", "same channels", align="left"),
)
NAIVE_ROWS = 5000
F = 1.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--layers", type=int, default=24)
    add("--heads", type=int, default=16)
    add("--channels", type=int, default=128)
    add("--keep", type=int, default=64)
    add("--threads", type=int, default=2)
    add("--rounds", type=int, default=5)
    add("--naive-heads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    heads, keep = options.layers * options.heads, options.keep
    gram, activations = matrices(heads, options.channels, options.naive_heads)
    seconds, cpu, kept = [], [], gram
    for _ in range(options.rounds):
        start, start_cpu = time.perf_counter(), time.process_time()
        kept = strong_rrqr(gram, keep, F)
        seconds.append(time.perf_counter() - start)
        cpu.append(time.process_time() - start_cpu)
    start, start_cpu = time.perf_counter(), time.process_time()
    chosen = [select_straightforwardly(rows, keep) for rows in activations.numpy()]
    naive = (time.perf_counter() - start) * heads / len(chosen)
    naive_cpu = (time.process_time() - start_cpu) * heads / len(chosen)
    same = sum(one == other for one, other in zip(chosen, kept.tolist(), strict=False))
    row = {
        "heads": heads,
        "channels": options.channels,
        "keep": keep,
        "threads": options.threads,
        "least": min(seconds),
        "median": statistics.median(seconds),
        "cpu": min(cpu),
        "reading": reading_seconds(gram),
        "naive": naive,
        "ratio": naive / min(seconds),
        "cpu_ratio": naive_cpu / min(cpu),
        "same": f"{same} of {len(chosen)}",
    }
    print(Table(COLUMNS, [row]).text())


def matrices(heads: int, channels: int, naive_heads: int) -> tuple[Tensor, Tensor]:
    """Gram matrices of random activations, and the activations behind the first ones."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, channels, dtype=torch.float64, generator=generator)

    # Channels of one head depend on each other, or there would be nothing to choose.
    mixing = random(heads, channels) / channels**0.5
    rows = random(heads, 2 * channels) @ mixing
    activations = random(naive_heads, NAIVE_ROWS) @ mixing[:naive_heads]
    gram = rows.mT @ rows
    gram[:naive_heads] = activations.mT @ activations
    return gram, activations


def select_straightforwardly(columns: np.ndarray, k: int) -> list[int]:
    """Channels kept of activations `[rows, channels]`: pivoted QR, then exchanges one by one."""
    order = scipy.linalg.qr(columns, mode="r", pivoting=True)[1]
    while True:
        triangle = np.linalg.qr(columns[:, order], mode="r")
        inverse = np.linalg.inv(triangle[:k, :k])
        lengths, rest = np.square(inverse).sum(1), np.square(triangle[k:, k:]).sum(0)
        growth = np.square(inverse @ triangle[:k, k:]) + np.outer(lengths, rest)
        i, j = np.unravel_index(growth.argmax(), growth.shape)
        if growth[i, j] <= F**2:
            return sorted(order[:k].tolist())
        order[[i, k + j]] = order[[k + j, i]]


def reading_seconds(gram: Tensor) -> float:
    """Seconds to read the Gram matrices of a file that was written just now."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "grams.safetensors"
        save_file({"gram": gram}, file)
        start = time.perf_counter()
        load_file(file)["gram"].clone()
        return time.perf_counter() - start


if __name__ == "__main__":
    main()
