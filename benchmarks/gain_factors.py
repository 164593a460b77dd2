"""How far pruned models are from the dense one, by what their eps makes of the gain.

    python -m benchmarks.gain_factors MODEL [--method output-error] [--ratios 0.5 0.75]
        [--powers -0.5 0 0.5 1 1.5] [--repair] [--sequences 16] [--heldout-sequences 16]
        [--pairs 8 16 24]

`norm_eps` of the pruned config is that of the dense one times (d_k / d_k')^power: 0 keeps the gain
of fewer key channels, as arXiv 2602.04852 publishes the models, and 1 undoes it. KL and the rise of
the loss are in nats a token on calibration text after that which was read; `--pairs` adds recall in
percent, of a model that was trained on it.
"""

import argparse
from dataclasses import replace
from typing import Any

from flame.checkpoint.reference import ModelReference, resolve
from flame.errors import run_stage
from flame.process.distributed import compute_dtype, data_parallel_mesh, process_group
from launch import recall
from launch.drawing.table import Column, Table
from pruning import prune
from pruning.calibrate import calibrate
from pruning.calibration.data import CalibrationData, calibration_data
from pruning.damage.applied import pruned_model
from pruning.damage.meter import DamageMeter
from pruning.planning.plan import Plan
from pruning.repair.repaired import repaired
from pruning.statistics import OutputEquations

COLUMNS = (
    Column("ratio", "removed"),
    Column("power", "power", ".2f"),
    Column("kl", "KL", ".4f"),
    Column("loss", "loss", "+.4f"),
)


def main() -> None:
    run_stage(_main)


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("model", help="run folder whose recipe names the text")
    add("--method", default="output-error")
    add("--ratios", nargs="+", default=["0.5", "0.75"])
    add("--powers", nargs="+", type=float, default=[-0.5, 0, 0.5, 1, 1.5])
    add("--repair", action="store_true", help="refit the output projections of each")
    add("--sequences", type=int, default=16)
    add("--heldout-sequences", type=int, default=16)
    add("--pairs", nargs="*", type=int, default=[])
    options = parser.parse_args()
    reference = resolve(options.model)
    with process_group():
        rows = [row for ratio in options.ratios for row in measured(reference, ratio, options)]
    columns = [*COLUMNS, *(Column(f"{n} pairs", number=".1f") for n in options.pairs)]
    print(Table(columns, rows).text())


def measured(reference: ModelReference, ratio: str, options: Any) -> list[dict[str, Any]]:
    """A row of the table for each power."""
    words = [options.model, "none", "--method", options.method, "--ratio", ratio, "--gain", "undo"]
    words += ["--sequences", str(options.sequences)]
    stage = prune.STAGE.parse(words)
    data = calibration_data(reference, stage.data)
    plan = prune.make_plan(stage, reference)
    plans = {power: _with_power(plan, power) for power in options.powers}
    if options.repair:
        plans = {power: _repaired(reference, each, data) for power, each in plans.items()}
    meter = DamageMeter(reference, data, options.heldout_sequences)
    return [
        {"ratio": ratio, "power": power, "kl": damage.kl, "loss": damage.loss}
        | _recall(reference, plans[power], options)
        for power, damage in zip(plans, meter.damages_of(list(plans.values())), strict=True)
    ]


def _with_power(plan: Plan, power: float) -> Plan:
    """`plan`, which undoes the gain, with another power of its factor of the eps."""
    dense = plan.config_before.get("norm_eps", 1e-6)
    factor = plan.config_after["norm_eps"] / dense
    return replace(plan, config_after={**plan.config_after, "norm_eps": dense * factor**power})


def _repaired(reference: ModelReference, plan: Plan, data: CalibrationData) -> Plan:
    sums, meta = calibrate(reference, (OutputEquations,), data, plan=plan)
    return repaired(plan, reference.source(), sums, meta.for_plan())


def _recall(reference: ModelReference, plan: Plan, options: Any) -> dict[str, float]:
    """Percent of values that are right, by numbers of pairs."""
    from launch.evaluation.recall_score import accuracy
    from launch.evaluation.recall_tasks import mqar_examples

    if not options.pairs:
        return {}
    given = recall.Options(models=(options.model,), pairs=tuple(options.pairs))
    task, encode = recall.task_of(given, reference), recall.encoder_of(given, reference)
    model = pruned_model(reference, plan, data_parallel_mesh(), compute_dtype())
    found = {}
    for n in options.pairs:
        examples = mqar_examples(task, n, given.examples, given.seed)
        right = accuracy(model, examples, encode=encode, batch_size=given.batch)
        found[f"{n} pairs"] = 100 * right
    return found


if __name__ == "__main__":
    main()
