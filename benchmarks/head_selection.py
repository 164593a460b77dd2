"""How the loss rises when heads go, by what chooses them, beside random heads.

    python -m benchmarks.head_selection MODEL [--kind head] [--ratios 0.25 0.5] [--shared 0.389]
                                        [--draws 5] [--sequences 24] [--rows 40]

Each ratio removes as many heads from every layer; those of `--shared` are removed from the whole
model by one threshold (`--allocate model`, where layers may keep different numbers). The rows of
held-out text are spread evenly, so that they are of many documents. A rise is in nats a token over
the dense model, and stands beside its part of the mean rise of `--draws` random choices; repaired,
beside that of the same choices repaired (`--repair output`), and `either` beside that of random
choices left as they are.

Two ways of choosing are here alone, since they gained nothing: `refit` takes the set without which
the layer's output, its projection fitted anew, has the least squared error, and `loss-weighted
refit` measures that error by F = Σ g gᵀ, g the loss's gradient at the layer's output.

Heads do not see one another before the output projection, so what the heads that stay give to it is
part of what the dense layer gives: all repairs are fitted from one pass.
"""

import argparse
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import combinations, product
from typing import Any, ClassVar

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from benchmarks.gain import built
from flame.checkpoint.load import load_model
from flame.checkpoint.reference import ModelReference, resolve
from flame.errors import run_stage
from flame.hugging_face.config_file import keeps_documents_apart, vocabulary_size
from flame.process.distributed import process_group
from launch.drawing.table import Column, Table
from launch.evaluation.heldout_text import HeldoutOptions, heldout_text
from launch.evaluation.perplexity import sum_losses
from pruning.adapters import adapter_for
from pruning.calibrate import calibrate
from pruning.calibration.data import CalibrationData, calibration_data
from pruning.methods import METHODS
from pruning.mixers import find_mixers, output_projection
from pruning.options import DataOptions
from pruning.planning.budgets import Budget
from pruning.planning.choose import choose
from pruning.planning.plan import Plan
from pruning.repair.output_fit import fitted_projection
from pruning.repair.repaired import repaired
from pruning.spaces import Space, output_axis, positions, rows
from pruning.statistics import OutputEquations, Statistic
from pruning.statistics.output_equations import OutputPair
from pruning.taps import tap_mixer_outputs
from pruning.transform.sliced_source import InMemory, SlicedSource
from pruning.transform.slices import slices_of

CHOOSING = ("output-error", "output-energy", "taylor", "wanda", "jrnp")

COLUMNS = (
    Column("removed", "removed", align="left"),
    Column("name", "chosen by", align="left"),
    Column("rise", "rise", ".4f"),
    Column("part", ": random", ".2f"),
    Column("repaired", "repaired", ".4f"),
    Column("repaired_part", ": random repaired", ".2f"),
    Column("either", "repaired : random", ".2f"),
)


@dataclass(frozen=True)
class Sums:
    """What the dense layers give, by layer: Σ z zᵀ as normal equations, and Σ g gᵀ."""

    equations: Mapping[int, OutputEquations]
    gradients: Mapping[int, Float64[Tensor, "hidden hidden"]]


@dataclass(frozen=True)
class Refit:
    """The set that leaves the least error of the layer's output once its projection is refitted."""

    sums: Sums
    weighted: bool
    name: ClassVar[str] = "refit"
    kinds: ClassVar = ("head", "value-head")
    needs: ClassVar = ()

    def select(
        self, space: Space, k: int, weights: Mapping[str, Tensor], statistics: Any
    ) -> Int64[Tensor, "H k"]:
        """The best of all sets: for few heads."""
        axis = output_axis(space)
        dense = weights[axis.fqn].double()
        gram = self.sums.equations[space.layer].gram
        metric = self.sums.gradients[space.layer] if self.weighted else torch.eye(len(dense))

        def error(of_rows: tuple[tuple[int, ...], ...]) -> float:
            at = positions(axis, rows(torch.tensor(of_rows)))
            missing = dense.clone()
            missing[:, at] -= fitted_projection(dense, dense[:, at], gram[at][:, at], gram[:, at])
            return float(((metric.double() @ missing) * (missing @ gram)).sum())

        sets = list(combinations(range(space.head_dim), k))
        return torch.tensor(min(product(sets, repeat=space.num_heads), key=error))


def main() -> None:
    run_stage(_main)


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="run folder whose recipe names training and held-out text")
    parser.add_argument("--kind", default="head", choices=Refit.kinds)
    parser.add_argument("--ratios", type=float, nargs="*", default=[0.25, 0.5])
    parser.add_argument("--shared", type=float, nargs="*", default=[0.389])
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--sequences", type=int, default=24)
    parser.add_argument("--rows", type=int, default=40)
    options = parser.parse_args()
    reference = resolve(options.model)
    data = calibration_data(
        reference, DataOptions(sequences=options.sequences, replay_fraction=1.0)
    )
    sums, held_out = _sums(reference, data), _rows(reference, options.rows)
    documents = {int(number) for row in held_out for number in row.documents}
    dense = _loss(load_model(reference), held_out)
    print(f"{len(held_out)} rows of {len(documents)} documents, dense loss {dense:.4f}", flush=True)
    with process_group():
        # Not the replays without single channels, which cost most.
        needs = {n for name in CHOOSING for n in METHODS[name].needs if options.kind in n.kinds}
        statistics, meta = calibrate(reference, tuple(needs), data)
    table: list[dict[str, Any]] = []
    seen: dict[str, list[float]] = {}
    for ratio, allocate in [(r, "uniform") for r in options.ratios] + [
        (r, "model") for r in options.shared if options.kind == "head"
    ]:
        budget = Budget(ratio=ratio, space=options.kind, allocate=allocate)  # type: ignore[arg-type]
        found: dict[str, list[list[float]]] = {}
        for name, method in _methods(options.draws, sums, allocate):
            plan = choose(
                reference.config, reference.source(), method, budget, statistics, meta.for_plan()
            )
            if (kept := _kept(plan)) not in seen:
                plans = (plan, _repaired(plan, reference, sums))
                models = (_pruned(reference, each) for each in plans)
                seen[kept] = [_loss(model, held_out) - dense for model in models]
            found.setdefault(name, []).append(seen[kept])
            print(ratio, allocate, name, *seen[kept], kept, flush=True)
        table += list(_table_rows(f"{ratio:g}{', shared' if allocate == 'model' else ''}", found))
    print(Table(COLUMNS, table).text())


def _rows(reference: ModelReference, count: int) -> list[Any]:
    text = heldout_text(reference, HeldoutOptions(max_sequences=count, spread=True))
    apart = keeps_documents_apart(reference.config)
    return list(text.sequences(vocabulary_size(reference.config), apart))


def _loss(model: Any, held_out: list[Any]) -> float:
    sums = sum_losses(model, held_out)
    return sums.loss / sums.tokens


def _pruned(reference: ModelReference, plan: Plan) -> Any:
    slices = slices_of(plan, reference.config)
    source = SlicedSource(reference.source(), slices, InMemory(plan.new_tensors))
    tensors = {name: source.read(name) for name in source.names()}
    return built(plan.config_after, tensors, torch.float32)


def _methods(draws: int, sums: Sums, allocate: str) -> Iterator[tuple[str, Any]]:
    for seed in range(draws):
        yield "random", METHODS["random"](seed=seed)  # type: ignore[call-arg]
    for name in CHOOSING:
        if allocate == "uniform" or hasattr(METHODS[name], "scores"):
            yield name, METHODS[name]()
    if allocate == "uniform":
        yield "refit", Refit(sums, weighted=False)
        yield "loss-weighted refit", Refit(sums, weighted=True)


def _table_rows(removed: str, found: Mapping[str, list[list[float]]]) -> Iterator[dict[str, Any]]:
    means = {name: [sum(x) / len(x) for x in zip(*of, strict=True)] for name, of in found.items()}
    random = means["random"]
    for name, (rise, repair) in means.items():
        yield {
            "removed": removed,
            "name": name,
            "rise": rise,
            "part": rise / random[0],
            "repaired": repair,
            "repaired_part": repair / random[1],
            "either": repair / random[0],
        }


def _kept(plan: Plan) -> str:
    return " ".join(f"{n}:{[row.tolist() for row in of]}" for n, of in plan.kept.items())


def _sums(reference: ModelReference, data: CalibrationData) -> Sums:
    """Of the dense model, with the gradients of the loss at its layers' outputs."""
    model, adapter = load_model(reference), adapter_for(reference.config)
    heads = [s for s in adapter.spaces(reference.config) if s.kind == "head"]
    equations = {space.layer: OutputEquations.zeros(space) for space in heads}
    gradients: dict[int, Tensor] = {}

    def add(layer: int, gradient: Tensor) -> None:
        g = gradient.flatten(0, -2).double()
        gradients[layer] = gradients.get(layer, 0) + g.mT @ g

    def watch(layer: int) -> Any:
        def hook(module: Any, given: tuple[Tensor, ...], out: Tensor) -> None:
            out.register_hook(lambda gradient: add(layer, gradient))

        return hook

    loader = data.loader(0, 1)
    with ExitStack() as stack:
        stack.enter_context(
            tap_mixer_outputs(model, adapter, lambda n, z: equations[n].update(OutputPair(z, z)))
        )
        for layer, mixer in find_mixers(model, adapter).items():
            hook = output_projection(mixer).register_forward_hook(watch(layer))
            stack.callback(hook.remove)
        for _, (inputs, labels) in zip(range(data.sequences), loader, strict=False):
            given = dict(inputs)
            logits = model(input_ids=given.pop("input"), use_cache=False, **given).logits
            loss = torch.nn.functional.cross_entropy
            loss(logits.flatten(0, 1), labels.flatten(), reduction="sum").backward()
            model.zero_grad()
    loader.close()
    return Sums(equations, gradients)


def _repaired(plan: Plan, reference: ModelReference, sums: Sums) -> Plan:
    of_layers: dict[str, dict[type[Statistic], Statistic]] = {
        space.name: {OutputEquations: sums.equations[space.layer]}
        for space in adapter_for(reference.config).spaces(reference.config)
        if space.kind == "head"
    }
    return replace(repaired(plan, reference.source(), of_layers, {}), notes=plan.notes)


if __name__ == "__main__":
    main()
