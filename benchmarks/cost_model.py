"""What a job sends and reads, by formula and counted, on real processes and in simulated worlds.

    python -m benchmarks.cost_model [--nproc 1 2 4] [--worlds 64 1024] [--node 8] [--config CONFIG]

On 1, 2 and 4 gloo processes a small model is trained, saved, resumed, started from and calibrated;
collectives are counted by torch's dispatcher and bytes of files at the read calls. In a simulated
world a step is taken by rank 0 of a job of that size (benchmarks/simulated_world.py); and a step is
written to the disk as all of its ranks would write it, and read as a node's ranks read it. Last
come the formulas' values for the model of a `config.json`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.cost_counts import CONFIG, Counts, count, sizes_of, write_assets
from benchmarks.cost_formulas import (
    calibration,
    fresh_start,
    gathered_by_a_save,
    read_by_apply,
    read_on_calibration,
    read_on_init,
    read_on_resume,
    shapes_of,
    training_step,
)
from benchmarks.simulated_world import bytes_read, rank_of, training_state, write_step
from flame.training.estimate import ENTRIES
from launch.drawing.table import Column, Table

FOLDER = "SLIMSTATE_COST_FOLDER"
"""Environment variable: where the processes of a job meet."""
COLUMNS = (
    Column("ranks", "ranks", ","),
    Column("phase", "phase", align="left"),
    Column("what", "of a rank (rank 0)", align="left"),
    Column("formula", "formula", ",.0f"),
    Column("counted", "counted", ",.0f"),
    Column("ratio", "counted : formula", ".3f"),
)
SAVE_COLUMNS = (
    Column("ranks", "ranks", ","),
    Column("chunks", "chunks", ","),
    Column("plans", "plans at rank 0, MB", ",.1f"),
    Column("index", "index, MB", ",.2f"),
    Column("each", "index a chunk, B", ",.0f"),
    Column("planning", "rank 0 plans, s", ",.2f"),
    Column("parsing", "a rank reads the index, s", ",.2f"),
    Column("resume", "a node reads to resume : step", ".3f"),
    Column("formula", "by formula", ".3f"),
)
WORKED_COLUMNS = (
    Column("ranks", "ranks", ","),
    Column("gathered", "gathered a micro-batch, GB", ",.2f"),
    Column("reduced", "reduced, GB", ",.2f"),
    Column("step", "saved step, GB", ",.1f"),
    Column("index", "index, MB", ",.1f"),
    Column("plans", "plans at rank 0, MB", ",.0f"),
    Column("resume", "a node reads to resume : step", ".2f"),
    Column("init", "for --init", ".2f"),
)
INDEX_CHUNK, FORM_CHUNK = 152, 1100
"""Bytes of a chunk in the index, and of an archive beside its numbers, as counted."""
OPTIONS = 16_900
"""Bytes of what a step holds of each parameter beside it and its moments: options."""
ROWS = {f"weight_{number}": (1024, 512) for number in range(8)}
"""The model of the simulated steps: few tensors, so that 1,024 ranks fit into this process."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nproc", type=int, nargs="*", default=[1, 2, 4], help="real processes")
    parser.add_argument("--worlds", type=int, nargs="*", default=[64, 1024], help="simulated ones")
    parser.add_argument("--node", type=int, default=8, help="ranks of a simulated node")
    parser.add_argument("--config", type=Path, help="the config.json of a model to work out")
    options = parser.parse_args()
    if "RANK" in os.environ:
        work()
        return
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        write_assets(Path(name))
        for processes in options.nproc:
            rows += rows_of(processes, *started(processes, Path(name)))
        for ranks in options.worlds:
            with rank_of(0, ranks, options.node):
                rows += rows_of(ranks, count(Path(name), is_real=False)[0], {}, Counter())
    print(Table(COLUMNS, rows).text(), end="\n\n", flush=True)
    saves = [saved(ranks, options.node) for ranks in options.worlds]
    print(Table(SAVE_COLUMNS, saves).text(), end="\n\n", flush=True)
    if options.config is not None:
        config = json.loads(options.config.read_text())
        worked = [worked_out(config, ranks, options.node) for ranks in (8, *options.worlds)]
        print(Table(WORKED_COLUMNS, worked).text())


def worked_out(config: dict[str, Any], ranks: int, node: int) -> dict[str, Any]:
    """The row of a model in bf16 with AdamW, sharded over all ranks."""
    shapes = shapes_of(config)
    _, volume = training_step(shapes, ranks, width=2)
    parameters = sum(map(len, shapes.blocks)) + len(shapes.rest) + len(shapes.replicated)
    chunks, numbers = 3 * parameters * ranks, 4 * shapes.numbers
    index, common = INDEX_CHUNK * chunks, OPTIONS * parameters
    form = FORM_CHUNK * chunks
    sizes: dict[str, float] = {"index": index, "common": common}
    sizes |= {"weights": numbers + form / 3, "step": 3 * numbers + form + index + common}
    sizes["entries"] = ENTRIES * parameters
    return {
        "ranks": ranks,
        "gathered": volume["all_gather"] / 1e9,
        "reduced": volume["reduce_scatter"] / 1e9,
        "step": sizes["step"] / 1e9,
        "index": index / 1e6,
        "plans": gathered_by_a_save(sizes, ranks)[0] / 1e6,
        "resume": read_on_resume(sizes, ranks, node) / sizes["step"],
        "init": read_on_init(sizes, ranks, node) / sizes["step"],
    }


def started(processes: int, folder: Path) -> tuple[Counts, dict[str, int], Counter[str]]:
    """Count on real processes: rank 0's counts, sizes, and the bytes that all ranks read."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {"OMP_NUM_THREADS": "1", **os.environ, FOLDER: str(folder)}
    words = [sys.executable, *command, "-m", "benchmarks.cost_model"]
    subprocess.run(words, check=True, env=environment, stdout=subprocess.DEVNULL)
    counts, sizes, read = json.loads((folder / "counts.json").read_text())
    return counts, sizes, Counter(read)


def work() -> None:
    """Count in one process of a job; rank 0 writes what all have counted."""
    from flame.process.distributed import gather_objects, process_group, rank

    folder = Path(os.environ[FOLDER])
    with process_group():
        counts, sizes = count(folder)
        read = together(gather_objects(counts))
        if rank() == 0:
            (folder / "counts.json").write_text(json.dumps((counts, sizes, read)))


def together(of_ranks: list[Counts]) -> Counter[str]:
    """The bytes of files that all ranks read, by phase."""
    read: Counter[str] = Counter()
    for counts in of_ranks:
        for phase, (_, sizes) in counts.items():
            read[phase] += sizes.get("read", 0)
    return +read


def rows_of(
    ranks: int, counts: Counts, sizes: dict[str, int], read: Counter[str]
) -> Iterator[dict[str, Any]]:
    """The table's rows for one number of ranks."""
    for phase, what, formula, counted in compared(ranks, counts, sizes, read):
        ratio = counted / formula if formula else None
        row = {"phase": phase, "what": what, "formula": formula, "counted": counted}
        yield {"ranks": ranks, **row, "ratio": ratio}


def compared(
    ranks: int, counts: Counts, sizes: dict[str, int], read: Counter[str]
) -> Iterator[tuple[str, str, float, float]]:
    """Phase, quantity, and its value by formula and as counted."""
    shapes = shapes_of(CONFIG)
    expected = {
        "fresh start": fresh_start(shapes, ranks),
        "step": training_step(shapes, ranks, accumulations=2),
        "calibration": calibration(shapes, _statistics(), ranks, rounds=2),
    }
    for phase, (calls, volume) in expected.items():
        for kind in calls if phase in counts else ():
            if phase != "calibration":
                yield phase, f"{kind}s", calls[kind], counts[phase][0][kind]
            yield phase, f"bytes of {kind}s", volume[kind], counts[phase][1][kind]
    if not sizes:
        return
    least, most = gathered_by_a_save(sizes, ranks)
    gathered = counts["save"][1]["gather"]
    yield "save", "least bytes gathered by rank 0", least, gathered
    yield "save", "most bytes gathered by rank 0", most, gathered
    formulas = {
        "resume": read_on_resume,
        "init": read_on_init,
        "calibration": read_on_calibration,
    }
    for phase, formula in formulas.items():
        yield phase, "bytes read by all ranks", formula(sizes, ranks, ranks), read[phase]
    yield "apply", "bytes read by all ranks", read_by_apply(sizes), read["apply"]


def _statistics() -> list[int]:
    """The bytes of each tensor that a calibration of `CONFIG` for the method drrqr sums."""
    from pruning.adapters import adapter_for
    from pruning.calibration.stats_file import zeros
    from pruning.statistics import QueryKeyGram

    collected = zeros(adapter_for(CONFIG).spaces(CONFIG), (QueryKeyGram,), CONFIG["hidden_size"])
    sums = [statistic for of_space in collected.values() for statistic in of_space.values()]
    return [total.nbytes for statistic in sums for total in statistic.state_dict().values()]


def saved(ranks: int, node: int) -> dict[str, Any]:
    """The row of a step that `ranks` ranks save together, and the ranks of a node resume from."""
    from flame.storage.safe_reader import SafeReader

    with tempfile.TemporaryDirectory() as name:
        work: dict[str, float] = {}
        step = write_step(Path(name), 1, ROWS, {}, ranks, node, work)
        sizes = sizes_of(step)
        begin = time.perf_counter()
        index = SafeReader(step).read_metadata()
        parsing = time.perf_counter() - begin
        chunks = len(index.storage_data)
        read = node_read(step, ranks, node)
        return {
            "ranks": ranks,
            "chunks": chunks,
            "plans": work["plan bytes"] / 1e6,
            "index": sizes["index"] / 1e6,
            "each": sizes["index"] / chunks,
            "planning": work["seconds"],
            "parsing": parsing,
            "resume": read / sizes["step"],
            "formula": read_on_resume(sizes, ranks, node) / sizes["step"],
        }


def node_read(step: Path, ranks: int, node: int) -> int:
    """Bytes that the ranks of the first node read to resume from a step, one after another."""
    total = 0
    for rank in range(node):
        with rank_of(rank, ranks, node):
            total += rank_read(step)
    return total


def rank_read(step: Path) -> int:
    """Bytes that this rank reads to resume from a step: what `check_start` and the load do."""
    from flame.checkpoint.dcp_source import DcpSource
    from flame.checkpoint.fingerprint import finite_parts
    from flame.checkpoint.verify import verify_together
    from flame.process.distributed import rank, world_size
    from flame.storage import compared as memo
    from flame.storage.load_step import load_step

    # Each rank is a process of its own, which trusts none but its peers in this start.
    memo._compared.clear()
    state = training_state(ROWS, {})
    before = bytes_read()
    verify_together(step)
    for _ in finite_parts(DcpSource(step), rank(), world_size()):
        pass
    if rank() == 0:
        DcpSource(step, everything=True).values()
    load_step(state, step)
    return bytes_read() - before


if __name__ == "__main__":
    main()
