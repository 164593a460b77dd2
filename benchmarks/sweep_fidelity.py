"""How far the pruned models of a sweep are from the dense one: KL in nats a token.

    python -m benchmarks.sweep_fidelity MODEL SWEEP [--sequences 48] [--only output-error drrqr]

A small model's loss on little text rises or falls by chance when it is pruned; the divergence of
its predictions from the dense model's does not. Models are made again from the plans that the sweep
kept. The rows are spread evenly over the model's held-out text, so that they are of many documents.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gain import built
from flame.checkpoint.load import load_model
from flame.checkpoint.reference import ModelReference, resolve
from flame.errors import run_stage
from flame.hugging_face.config_file import keeps_documents_apart, vocabulary_size
from launch.drawing.table import Column, Table
from launch.evaluation.fidelity import sum_divergences
from launch.evaluation.heldout_text import HeldoutOptions, heldout_text
from pruning.planning.plan import Plan
from pruning.planning.plan_file import read_plan, with_loaded_tensors
from pruning.transform.sliced_source import InMemory, SlicedSource
from pruning.transform.slices import slices_of

COLUMNS = (Column("name", "pruned", align="left"), Column("kl", "KL, nats a token", ".5f"))


def main() -> None:
    run_stage(_main)


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="run folder whose recipe names held-out text")
    parser.add_argument("sweep", type=Path, help="folder of slimstate sweep")
    parser.add_argument("--sequences", type=int, default=48)
    parser.add_argument("--only", nargs="*", default=[""], metavar="BEGINNING")
    options = parser.parse_args()
    reference = resolve(options.model)
    dense, rows = load_model(reference), _rows(reference, options.sequences)
    table = []
    for folder in sorted((options.sweep / "plans").iterdir()):
        if folder.name.startswith(tuple(options.only)):
            plan = with_loaded_tensors(read_plan(folder / "plan.json"), folder)
            total, _, tokens, _ = sum_divergences(_pruned(reference, plan), dense, rows)
            table.append({"name": folder.name, "kl": total / tokens})
            print(f"{folder.name} {total / tokens:.5f}", flush=True)
    print(Table(COLUMNS, table).text())


def _rows(reference: ModelReference, count: int) -> Sequence[Any]:
    """`count` rows of the held-out text, evenly spread."""
    text = heldout_text(reference, HeldoutOptions())
    apart = keeps_documents_apart(reference.config)
    every = list(text.sequences(vocabulary_size(reference.config), apart))
    return every[:: max(len(every) // count, 1)][:count]


def _pruned(reference: ModelReference, plan: Plan) -> Any:
    import torch

    slices = slices_of(plan, reference.config)
    source = SlicedSource(reference.source(), slices, InMemory(plan.new_tensors))
    tensors = {name: source.read(name) for name in source.names()}
    return built(plan.config_after, tensors, torch.float32)


if __name__ == "__main__":
    main()
