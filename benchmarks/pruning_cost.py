"""What calibration and repair take beside what `--estimate` says, on one process here.

    python -m benchmarks.pruning_cost [--keys 32 128] [--hidden 512] [--layers 2] [--tokens 1024]

A random GatedDeltaNet for each width of the keys, values twice as wide. Each part runs over 3 and
over 1 sequences, and the difference counts, so that loading and imports do not; rates and parts are
both in CPU time of one thread. Every sequence is replayed.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.memory_stages import write_folder, write_text
from flame.checkpoint.reference import ModelReference, resolve
from flame.process.distributed import process_group
from launch.drawing.table import Column, Table
from pruning.calibrate import calibrate
from pruning.calibration.data import calibration_data
from pruning.cost.counts import Counts
from pruning.cost.table import measured, parts
from pruning.methods import METHODS
from pruning.options import DataOptions
from pruning.planning.budgets import Budget
from pruning.planning.choose import choose
from pruning.planning.plan import Plan
from pruning.repair.layer_fit import with_fitted_layers
from pruning.repair.layer_options import LayerOptions
from pruning.repair.repaired import repaired
from pruning.spaces import Kind
from pruning.statistics import (
    HeadOutputErrors,
    KeyOutputErrors,
    OutputEquations,
    QueryKeyGram,
    Statistic,
    ValueOutputErrors,
    WeightGradientProducts,
)

FEW, MANY = 1, 3
STEPS = 8
KINDS: dict[str, type[Statistic]] = {
    "drrqr": QueryKeyGram,
    "taylor": WeightGradientProducts,
    "output-error of key channels": KeyOutputErrors,
    "output-error of value channels": ValueOutputErrors,
    "output-error of heads": HeadOutputErrors,
}
COLUMNS = (
    Column("keys", "key channels", ","),
    Column("name", "part", align="left"),
    Column("estimate", "estimated, s", ".2f"),
    Column("found", "CPU, s", ".2f"),
    Column("ratio", "estimated : found", ".2f"),
    Column("of_drrqr", "found : drrqr's", ".2f"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--keys", type=int, nargs="*", default=[32, 128])
    add("--hidden", type=int, default=512)
    add("--layers", type=int, default=2)
    add("--tokens", type=int, default=1024)
    add("--parts", nargs="*", default=[], help="beginnings of names (default: all)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name, process_group():
        write_text(Path(name) / "text")
        for key in options.keys:
            rows = list(rows_of(key, options, Path(name)))
            print(Table(COLUMNS, rows).text(), flush=True)


def rows_of(key: int, options: Any, folder: Path) -> Iterator[dict[str, Any]]:
    config = {
        "model_type": "gated_deltanet",
        "architectures": ["GatedDeltaNetForCausalLM"],
        "hidden_size": options.hidden,
        "num_hidden_layers": options.layers,
        "num_heads": max(1, options.hidden // (2 * key)),
        "head_dim": key,
        "expand_v": 2.0,
        "vocab_size": 512,
        "hidden_ratio": 4,
    }
    write_folder(folder / str(key), config)
    reference = resolve(folder / str(key))
    text = folder / "text"
    data = DataOptions(
        data=str(text / "text.jsonl"),
        tokenizer=str(text / "tokenizer"),
        sequences=MANY - FEW,
        seq_len=options.tokens,
        replay_fraction=1.0,
    )
    local = LayerOptions(repair_steps=STEPS, repair_heldout=0.5)
    rates = measured(config, time.process_time)
    kinds: tuple[Kind, ...] = ("key", "value", "head")
    estimates = {
        part.name: part.seconds(rates, 1)
        for part in parts(Counts(config, 4), data, options.tokens, kinds, local)
    }
    drrqr = 0.0
    calibrate(reference, (QueryKeyGram,), calibration_data(reference, replace(data, sequences=1)))
    for name, work in works(reference, config, data, local).items():
        if options.parts and not name.startswith(tuple(options.parts)):
            continue
        found = work()
        drrqr = drrqr or found
        yield {
            "keys": key,
            "name": name,
            "estimate": estimates[name],
            "found": found,
            "ratio": estimates[name] / found,
            "of_drrqr": found / drrqr,
        }


def works(
    reference: ModelReference, config: dict[str, Any], data: DataOptions, local: LayerOptions
) -> dict[str, Callable[[], float]]:
    """By name, what measures a part's CPU seconds."""

    def passes(kind: type[Statistic], plan: Plan | None = None) -> float:
        return _more(lambda count: calibrate(reference, (kind,), _data(count), plan=plan))

    def _data(count: int) -> Any:
        return calibration_data(reference, replace(data, sequences=count))

    def plan() -> Plan:
        budget = Budget(width=config["head_dim"] // 2, multiple_of=8)
        return choose(config, reference.source(), METHODS["l1"](), budget)

    def repair_output() -> float:
        chosen = plan()
        sums, meta = calibrate(reference, (OutputEquations,), _data(FEW), plan=chosen)
        begin = time.process_time()
        for new in repaired(chosen, reference.source(), sums, meta.for_plan()).new_tensors.values():
            new.make()  # type: ignore[union-attr]
        return time.process_time() - begin + passes(OutputEquations, chosen)

    def repair_layer() -> float:
        chosen = plan()
        sums, meta = calibrate(reference, (OutputEquations,), _data(FEW), plan=chosen)
        fitted = repaired(chosen, reference.source(), sums, meta.for_plan())
        count = data.sequences

        def layers(steps: int) -> None:
            with_fitted_layers(reference, fitted, _data(count), replace(local, repair_steps=steps))

        one, more = (_seconds(partial(layers, steps)) for steps in (1, 1 + STEPS))
        return more - one

    found = {name: (lambda kind=kind: passes(kind)) for name, kind in KINDS.items()}
    return {**found, "repair output": repair_output, "local steps": repair_layer}


def _more(work: Callable[[int], object]) -> float:
    """Seconds of `MANY` less `FEW` sequences."""
    few, many = (_seconds(partial(work, count)) for count in (FEW, MANY))
    return many - few


def _seconds(work: Callable[[], object]) -> float:
    begin = time.process_time()
    work()
    return time.process_time() - begin


if __name__ == "__main__":
    main()
