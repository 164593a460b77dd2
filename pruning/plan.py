"""Stage `plan`: choose the channels to keep, and write the plan. Rank 0 does the work."""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from flame.checkpoint.fingerprint import fingerprint
from flame.checkpoint.foreign import GIVEN, GivenFiles
from flame.checkpoint.reference import ModelReference
from flame.checkpoint.source import source_infos
from flame.errors import UserError
from flame.hugging_face.outer_model import OuterModel
from flame.options import argument, group, option
from flame.process.atomic_output import replacing_file
from flame.process.distributed import RANK_ZERO_WORKS, process_group
from flame.process.output_checks import check_file_output
from flame.process.peers import on_first
from flame.stage import Stage
from pruning.adapters import ADAPTERS, adapter_for
from pruning.adapters.interface import Config
from pruning.calibration.stats_file import check_kinds, check_model, load_statistics, read_meta
from pruning.methods import Method
from pruning.options import BUDGET, MODEL_HELP, OVERWRITE_HELP, MethodOptions, seed_option
from pruning.planning.budgets import Budget
from pruning.planning.choose import check_budget, choose
from pruning.planning.fitting import fitted
from pruning.planning.held import held_by_choosing, say_choosing
from pruning.planning.plan import Plan, planned_spaces, spaces_of_kinds
from pruning.planning.plan_file import plan_text, with_saved_tensors
from pruning.repair.gates import needs_of, refits
from pruning.repair.repaired import REPAIR_HELP, Repair, choice_mark, layers_of, repaired
from pruning.serving.verdict import around, serving_lines
from pruning.spaces import Space, widths_of
from pruning.statistics import OutputEquations, Statistic


@dataclass(frozen=True)
class Options:
    model: str = argument("MODEL", MODEL_HELP)
    plan: Path = argument("PLAN", "file to write")
    stats: Path | None = option(None, "folder that slimstate calibrate wrote")
    repair: Repair = option("none", REPAIR_HELP)
    repair_stats: Path | None = option(
        None, "folder that slimstate calibrate --plan wrote for this choice"
    )
    overwrite: bool = option(False, OVERWRITE_HELP)
    seed: int = seed_option()
    choice: MethodOptions = group(MethodOptions, "method")
    budget: Budget = group(Budget, BUDGET)
    given: GivenFiles = group(GivenFiles, GIVEN)

    @property
    def method(self) -> Method:
        """The method with its hyper-parameters; raises UserError if there is no such method."""
        return self.choice.chosen(self.seed, self.budget.paper)


def check(options: Options, world_size: int = 1) -> None:
    """Raise UserError if the model, budget, method, statistics or output cannot work."""
    reference = options.given.resolve(options.model)
    check_file_output(options.plan, options.overwrite, inside=reference.folder)
    method = options.method
    budget = fitted(options.budget, reference.config, method, reference.outer)
    check_budget(budget, reference.config, method)
    if budget.allocate == "auto":
        raise UserError(
            "--allocate auto runs the model on held-out text, and plan reads none: use slimstate "
            "prune, which leaves the plan in its output"
        )
    if budget.gain == "measured":
        raise UserError(
            "--gain measured runs pruned models on held-out text, and plan reads none: use "
            "slimstate prune, which leaves the plan in its output"
        )
    spaces = spaces_of_kinds(adapter_for(reference.config), reference.config, budget.kinds)
    if hasattr(method, "new_tensors") or refits(spaces) or options.repair != "none":
        check_file_output(tensors_beside(options.plan), options.overwrite, reference.folder)
    check_stats(options.stats, method, needed(method, budget, reference.config))
    _check_repair(options)


def run(options: Options) -> None:
    """Write the plan and print what it does. Collective; rank 0 works and the others wait."""

    def write() -> None:
        reference, method = options.given.resolve(options.model), options.method
        budget = fitted(options.budget, reference.config, method, reference.outer)
        _say_bound(options, reference, method, budget)
        plan = planned(reference, method, budget, options.stats)
        if options.repair_stats is not None:
            plan = _repaired(plan, options, options.repair_stats)
        with ExitStack() as stack:
            file = stack.enter_context(replacing_file(options.plan, options.overwrite))
            if plan.new_tensors:
                plan = _saved(plan, options, stack)
            file.write_text(plan_text(plan))
        print(f"{options.plan}: {summary(plan)}", flush=True)
        say_notes(plan, reference.outer)

    with process_group(RANK_ZERO_WORKS):
        on_first(write)


def _say_bound(options: Options, reference: ModelReference, method: Method, budget: Budget) -> None:
    config = reference.config
    spaces = spaces_of_kinds(adapter_for(config), config, budget.kinds)
    needs = needed(method, budget, config)
    layers = layers_of(config) if options.repair != "none" else []
    infos = source_infos(reference.source())
    say_choosing(held_by_choosing(config, infos, spaces, method, needs, layers))


def needed(method: Method, budget: Budget, config: Config) -> tuple[type[Statistic], ...]:
    """The statistics that a plan needs: the method's, and those of gates that are refitted."""
    return needs_of(method, spaces_of_kinds(adapter_for(config), config, budget.kinds))


def check_stats(stats: Path | None, method: Method, needs: tuple[type[Statistic], ...]) -> None:
    """Raise UserError if a plan lacks statistics, or is given some that it does not read.

    Args:
        stats: the folder given, if one is.
        method: what chooses, for messages.
        needs: what the plan needs (`needed`).
    """
    if not needs:
        if stats is not None:
            raise UserError(f"{method.name} reads no statistics: leave --stats {stats} out")
        return
    if stats is None:
        why = "chooses" if method.needs else "and the refit of the low-rank gates go"
        raise UserError(
            f"{method.name} {why} by statistics: make them with slimstate calibrate, and give "
            "--stats"
        )
    check_kinds(stats, read_meta(stats), needs, method.name)


def _check_repair(options: Options) -> None:
    """Raise UserError if a repair lacks its sums, or sums are given without a repair."""
    if options.repair == "none":
        if options.repair_stats is not None:
            raise UserError(
                f"--repair-stats {options.repair_stats} is for a repair: give --repair output too"
            )
        return
    if options.repair == "layer":
        raise UserError("--repair layer trains layers on data: slimstate prune does that")
    if options.repair_stats is None:
        raise UserError(
            f"--repair {options.repair} reads data: plan without it, then make its sums with "
            f"slimstate calibrate {options.model} SUMS --plan {options.plan}, and give "
            "--repair-stats SUMS (slimstate prune does all of it)"
        )
    meta = read_meta(options.repair_stats)
    check_kinds(options.repair_stats, meta, (OutputEquations,), f"--repair {options.repair}")


def _repaired(plan: Plan, options: Options, stats: Path) -> Plan:
    """`plan` with its repair; UserError if `stats` are of another choice or model."""
    meta = read_meta(stats)
    check_model(stats, meta, plan.fingerprint)
    if meta.plan != choice_mark(plan):
        raise UserError(
            f"{stats} has the sums of another plan's layers: run slimstate calibrate --plan for "
            "what this method and budget choose"
        )
    spaces = layers_of(plan.config_before)
    sums = load_statistics(stats, spaces, (OutputEquations,))
    source = options.given.resolve(options.model).source()
    return repaired(plan, source, sums, meta.for_plan())


def planned(
    reference: ModelReference,
    method: Method,
    budget: Budget,
    stats: Path | None,
    damage: dict[str, float] | None = None,
) -> Plan:
    """Return the plan of `method` from saved statistics. Runs on one process.

    `damage` is as in `pruning.planning.choose.choose`.

    It reads the tensors that the spaces index, and samples of the others; `apply` reads them all,
    and refuses those that are not finite.

    Raises:
        UserError: a weight that is read is not finite, or the statistics are another model's.
    """
    config, source = reference.config, reference.source()
    needs = needed(method, budget, config)
    if stats is None or not needs:
        return choose(config, source, method, budget, damage=damage)
    meta = read_meta(stats)
    check_model(stats, meta, fingerprint(config, source))
    spaces = spaces_of_kinds(adapter_for(config), config, budget.kinds)
    statistics = load_statistics(stats, spaces, needs)
    return choose(config, source, method, budget, statistics, meta.for_plan(), damage)


def summary(plan: Plan) -> str:
    """Return one line about a plan: widths kept, layers, bytes of state before and after."""
    before = adapter_for(plan.config_before)
    after = ADAPTERS[plan.config_after["model_type"]]
    spaces = planned_spaces(plan, plan.config_before)
    kinds = dict.fromkeys(space.kind for space in spaces)
    widths = widths_of(spaces, plan.kept)
    kept = ", ".join(_kept([s for s in spaces if s.kind == kind], widths) for kind in kinds)
    sizes = before.state_bytes(plan.config_before), after.state_bytes(plan.config_after)
    padded = " (filled up with zeros to the widest)" if plan.pad else ""
    return (
        f"{plan.method} keeps {kept} in {len({space.layer for space in spaces})} layers{padded}; "
        f"state of a sequence {sizes[0]:,} -> {sizes[1]:,} bytes"
    )


def _kept(spaces: list[Space], widths: dict[str, tuple[int, ...]]) -> str:
    """Say what spaces of one kind keep, such as `16 to 64 of 128 key channels a head`."""
    found = sorted({width for space in spaces for width in widths[space.name]})
    some = str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"
    first = spaces[0]
    return f"{some} of {first.head_dim} {first.noun}{'' if first.kind == 'head' else ' a head'}"


def say_notes(plan: Plan, outer: OuterModel | None) -> None:
    """Print the plan's notes, and which engines serve its result: what a user must know."""
    for note in plan.notes:
        print(f"note: {note}", flush=True)
    for line in serving_lines(around(plan.config_after, outer), plan.config_before):
        print(f"serving: {line}", flush=True)


def tensors_beside(plan: Path) -> Path:
    """The file for a plan's new tensors."""
    return plan.with_name(f"{plan.stem}.tensors.safetensors")


def _saved(plan: Plan, options: Options, stack: ExitStack) -> Plan:
    """`plan` with its new tensors in a file that stays if the stack closes without error."""
    path = tensors_beside(options.plan)
    file = stack.enter_context(replacing_file(path, options.overwrite))
    return with_saved_tensors(plan, file, path.name)


STAGE = Stage("plan", "Choose the channels to keep.", Options, run, check)

if __name__ == "__main__":
    STAGE.main()
