"""What calibration's statistics cost, over the forward pass that they are gathered in.

    python -m benchmarks.calibration [--hidden 1024] [--heads 8] [--layers 4] [--tokens 2048]

A random `delta_net` under FSDP2 on one process, a sequence a pass, as in a calibration. In every
round each set of statistics runs once, in turn, the plain pass among them, so that all meet the
same load; the best round of each counts. CPU time is given beside wall time, since other processes
lengthen it less. `taylor` needs a backward pass.
"""

import argparse
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from flame.process.distributed import data_parallel_mesh, process_group
from launch.drawing.table import Column, Table
from pruning.adapters import adapter_for
from pruning.calibration.collect import run_batch
from pruning.calibration.feeding import Feed
from pruning.calibration.gradients import WeightGradients
from pruning.calibration.stats_file import zeros
from pruning.statistics import (
    HeadOutputGram,
    InputSquares,
    KeySquares,
    NormalisedGrams,
    OutputSquares,
    QueryKeyGram,
    QueryKeySample,
    StateSpectra,
    Statistic,
    ValueSquares,
    WeightGradientProducts,
)
from pruning.statistics.row_sample import row_sample

Kinds = tuple[type[Statistic], ...]

SETS: dict[str, Kinds] = {
    "none": (),
    "key Grams, input norms": (QueryKeyGram, InputSquares),
    "key Grams": (QueryKeyGram,),
    "input and output norms (wanda)": (InputSquares, OutputSquares),
    "output Grams of heads (output-energy)": (HeadOutputGram,),
    "sample of rows (drrqr --rows)": (QueryKeySample,),
    "normalised Grams (pca)": (NormalisedGrams,),
    "activation norms": (KeySquares, ValueSquares),
    "state spectra (jrnp)": (StateSpectra,),
    "gradients (taylor)": (WeightGradientProducts,),
}

COLUMNS = (
    Column("name", "statistics"),
    Column("cpu", "CPU, s", ".3f"),
    Column("ratio", "CPU : plain", ".3f"),
    Column("wall", "wall, s", ".3f"),
    Column("wall_ratio", "wall : plain", ".3f"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--hidden", type=int, default=1024)
    add("--heads", type=int, default=8)
    add("--layers", type=int, default=4)
    add("--tokens", type=int, default=2048)
    add("--rounds", type=int, default=5)
    add("--threads", type=int, default=1)
    add("--only", default="", help="comma list of parts of names: run these and the plain pass")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config = _config(options)
    parts = options.only.split(",")
    chosen = {n: k for n, k in SETS.items() if n == "none" or any(part in n for part in parts)}
    with process_group():
        model = _model(config)
        passes = {name: _pass(model, config, kinds, options) for name, kinds in chosen.items()}
        rows = _measure(passes, options.rounds)
    load = ", ".join(f"{part:.1f}" for part in os.getloadavg())
    print(
        f"delta_net, hidden {options.hidden}, {options.layers} layers, {options.heads} heads of "
        f"{options.hidden // options.heads}; {options.tokens} tokens a pass, float32, "
        f"{options.threads} thread(s), torch {torch.__version__}, load of the machine {load}"
    )
    print(Table(COLUMNS, rows).text())


def _config(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "model_type": "delta_net",
        "hidden_size": options.hidden,
        "num_hidden_layers": options.layers,
        "num_heads": options.heads,
        "vocab_size": 1024,
        "max_position_embeddings": options.tokens,
    }


def _model(config: dict[str, Any]) -> nn.Module:
    from flame.model import initialise, meta_model, restore_after_to_empty, shard

    model = shard(meta_model(config), data_parallel_mesh())
    model.to_empty(device="cpu")
    restore_after_to_empty(model)
    initialise(model, config, seed=0)
    return model.eval()


def _pass(
    model: nn.Module, config: dict[str, Any], kinds: Kinds, options: argparse.Namespace
) -> Callable[[], None]:
    """One sequence through the model, with the statistics of these kinds."""
    adapter = adapter_for(config)
    spaces = adapter.spaces(config)
    collected = zeros(spaces, kinds, options.hidden)
    feed = Feed(collected, spaces, adapter, row_sample(16, options.tokens, seed=0))
    tokens = torch.randint(1024, (1, options.tokens), generator=torch.Generator().manual_seed(0))
    batch = ({"input": tokens}, tokens)

    def run() -> None:
        with _ready(model, spaces, kinds) as gradients, feed.attached(model):
            feed.start(0)
            run_batch(model, batch, gradients)
            if gradients is not None:
                gradients.add("")

    return run


@contextmanager
def _ready(model: nn.Module, spaces: Any, kinds: Kinds) -> Iterator[WeightGradients | None]:
    """The model with gradients by its projections, or in evaluation mode without any."""
    if WeightGradientProducts not in kinds:
        model.eval()
        yield None
        return
    yield WeightGradients(model, spaces)
    model.requires_grad_(False)


def _measure(passes: dict[str, Callable[[], None]], rounds: int) -> list[dict[str, object]]:
    for run in passes.values():
        run()
    taken: dict[str, list[Tensor]] = {name: [] for name in passes}
    for _ in range(rounds):
        for name, run in passes.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            taken[name].append(torch.tensor([cpu, wall]))
    least = {name: torch.stack(times).amin(0) for name, times in taken.items()}
    return [_row(name, times, least["none"]) for name, times in least.items()]


def _row(name: str, least: Tensor, plain: Tensor) -> dict[str, object]:
    (cpu, wall), (ratio, wall_ratio) = least.tolist(), (least / plain).tolist()
    return {"name": name, "cpu": cpu, "ratio": ratio, "wall": wall, "wall_ratio": wall_ratio}


if __name__ == "__main__":
    main()
