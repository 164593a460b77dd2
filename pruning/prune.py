"""Stage `prune`: calibrate, plan and apply in one; the plan stays in the output.

A method that needs no statistics reads no data, and takes a model without a tokenizer.
"""

import gc
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from flame.checkpoint.foreign import GIVEN, GivenFiles
from flame.checkpoint.reference import (
    Form,
    ModelReference,
    check_destination,
)
from flame.hugging_face.config_file import vocabulary_size
from flame.hugging_face.put_back import check_around
from flame.options import argument, group, option
from flame.process.atomic_output import replacing_folder
from flame.process.distributed import RANK_ZERO_WORKS, from_rank_zero, process_group, rank
from flame.process.peers import Peers, on_first
from flame.stage import Stage
from pruning.adapters import adapter_for
from pruning.adapters.interface import Config
from pruning.apply import form_of, say_what_to_know
from pruning.calibrate import calibrate
from pruning.calibration.data import calibration_data, check_data
from pruning.calibration.gradients import check_gradients
from pruning.cost.default import said_default
from pruning.cost.table import EstimateOptions, estimate_text
from pruning.damage.auto import auto_plan
from pruning.damage.gain import with_measured_gain, with_measured_repair
from pruning.damage.meter import check_measurement, measured_data
from pruning.methods import Method
from pruning.options import (
    BUDGET,
    MODEL_HELP,
    OVERWRITE_HELP,
    SEQUENCES,
    DataOptions,
    MethodOptions,
    check_no_data,
)
from pruning.plan import check_stats, needed, planned, summary
from pruning.planning.budgets import Budget
from pruning.planning.choose import check_budget, choose, ratio_notes
from pruning.planning.fitting import fitted
from pruning.planning.plan import Plan, spaces_of_kinds
from pruning.repair.layer_fit import with_fitted_layers
from pruning.repair.layer_options import LayerOptions
from pruning.repair.repaired import REPAIR_HELP, Repair, repaired
from pruning.statistics import OutputEquations, Statistic
from pruning.transform.write import write_pruned


@dataclass(frozen=True)
class Options:
    model: str = argument("MODEL", MODEL_HELP)
    out: Path = argument("OUT", "folder to write")
    to: Form | None = option(None, "format to write (default: the model's)")
    stats: Path | None = option(None, "use the statistics of slimstate calibrate")
    repair: Repair | None = option(
        None,
        f"{REPAIR_HELP} (default: output where neither --method nor --paper is given, if that is "
        "measured to help)",
    )
    heldout_sequences: int = option(
        SEQUENCES,
        "sequences after those calibrated on, on which --gain measured and --allocate auto measure",
        least=1,
        metavar="N",
    )
    overwrite: bool = option(False, OVERWRITE_HELP)
    choice: MethodOptions = group(MethodOptions, "method")
    budget: Budget = group(Budget, BUDGET)
    data: DataOptions = group(DataOptions, "calibration")
    local: LayerOptions = group(LayerOptions, "repair layer")
    cost: EstimateOptions = group(EstimateOptions, "estimate")
    given: GivenFiles = group(GivenFiles, GIVEN)

    @property
    def method(self) -> Method:
        """The method with its hyper-parameters; raises UserError if there is no such method."""
        return self.choice.chosen(self.data.seed, self.budget.paper)

    @property
    def repairs(self) -> bool:
        """Whether output projections are refitted, and so data is read."""
        return self.repair in ("output", "layer") or (self.repair is None and self.is_default)

    @property
    def is_default(self) -> bool:
        """Whether the way of choosing is left to this program."""
        return not self.choice.method and not self.budget.paper

    @property
    def measures_gain(self) -> bool:
        """Whether pruned models' predictions decide about the gain."""
        if self.budget.gain is not None:
            return self.budget.gain == "measured"
        return self.is_default and (self.stats is None or self.repairs)

    @property
    def measures_repair(self) -> bool:
        """Whether they decide about the repair too."""
        return self.repair is None and self.is_default and self.measures_gain

    @property
    def shares_by_damage(self) -> bool:
        """Whether masked models' predictions decide how heads share channels."""
        return self.budget.allocate == "auto"

    @property
    def measures(self) -> str:
        """What measures on held-out text, as messages name it; empty if nothing does."""
        if self.shares_by_damage:
            return "--allocate auto"
        return "--gain measured (--gain undo needs none)" if self.measures_gain else ""

    def needs(self, budget: Budget, config: Config) -> tuple[type[Statistic], ...]:
        """The statistics that the plan needs and that no folder gives."""
        return needed(self.method, budget, config) if self.stats is None else ()


def check(options: Options, world_size: int = 1) -> None:
    """Raise UserError if the model, budget, method, statistics, data or output cannot work."""
    reference = options.given.resolve(options.model)
    check_destination(reference, options.out, options.overwrite)
    check_around(reference, form_of(options.to, reference))
    budget = fitted(options.budget, reference.config, options.method, reference.outer)
    widths = check_budget(budget, reference.config, options.method)
    needs = options.needs(budget, reference.config)
    if options.stats is not None:
        wanted = needed(options.method, budget, reference.config)
        check_stats(options.stats, options.method, wanted)
    reads = bool(needs or options.repairs or options.measures)
    if options.stats is not None and not reads:
        check_no_data(replace(options.data, seed=DataOptions.seed), options.stats)
    options.local.check(options.repair, options.data.sequences)
    if reads:
        check_gradients(needs, reference.config)
        data = calibration_data(reference, options.data)
        if options.shares_by_damage:
            check_measurement(options.stats, data)
        text = data
        if options.measures:
            text = measured_data(data, options.heldout_sequences, options.measures)
        check_data(text, vocabulary_size(reference.config), world_size)
        if options.is_default:
            spaces = spaces_of_kinds(adapter_for(reference.config), reference.config, budget.kinds)
            measured = options.heldout_sequences if options.measures_gain else 0
            said = said_default(spaces, data, options.stats is None, options.repairs, measured)
            print(f"note: no --method is named: {options.method.name} {said}", flush=True)
        # Also in the plan's notes; here it is said before the work.
        for note in ratio_notes(budget, reference.config, widths):
            print(f"note: {note}", flush=True)


def run(options: Options) -> None:
    """Write the pruned model. Collective; starts a process group unless one is running."""
    reference, out = options.given.resolve(options.model), options.out.absolute()
    form = form_of(options.to, reference)
    with process_group(RANK_ZERO_WORKS), ExitStack() as stack:
        output = replacing_folder(out, options.overwrite)
        folder = on_first(lambda: stack.enter_context(output))
        plan = make_plan(options, reference)
        on_first(lambda: write_pruned(plan, reference, folder, form, out))
        on_first(stack.close)
        if rank() == 0:
            print(f"{options.out}: {summary(plan)}", flush=True)
            say_what_to_know(plan, reference, form)


def make_plan(options: Options, reference: ModelReference) -> Plan:
    """Return the plan on rank 0, and a meaningless value on others. Collective.

    Calibrates if the method needs statistics and the options name none, and once more, with the
    pruned layers beside the dense ones, for a repair. The gain is measured before that, since
    refitted projections make up for most of it.
    """
    plan = _chosen(options, reference)
    if not (options.repairs or options.measures_gain):
        return plan
    plan = from_rank_zero(plan)
    data, count = calibration_data(reference, options.data), options.heldout_sequences
    damage = None
    if options.measures_gain:
        _let_go()
        plan, damage = with_measured_gain(reference, plan, data, count)
    if not options.repairs:
        return plan
    _let_go()
    sums, meta = calibrate(reference, (OutputEquations,), data, plan=plan)
    # By every process, since all have the sums, and a plan's tensors that are made later cannot be
    # sent.
    whole = Peers().agree(lambda: repaired(plan, reference.source(), sums, meta.for_plan()))
    _let_go()
    if options.repair == "layer":
        return with_fitted_layers(reference, whole, data, options.local)
    if damage is None or not options.measures_repair:
        return whole
    return with_measured_repair(reference, plan, damage, whole, data, count)


def _chosen(options: Options, reference: ModelReference) -> Plan:
    """The plan before any repair, on rank 0. Collective."""
    method = options.method
    budget = fitted(options.budget, reference.config, method, reference.outer)
    if options.measures_gain:
        budget = replace(budget, gain="measured")
    needs = options.needs(budget, reference.config)
    sums = None
    if needs:
        sums = calibrate(reference, needs, calibration_data(reference, options.data))

    def chosen(budget: Budget, damage: dict[str, float] | None = None) -> Plan:
        if sums is None:
            return planned(reference, method, budget, options.stats, damage)
        collected, meta = sums
        source, record = reference.source(), meta.for_plan()
        return choose(reference.config, source, method, budget, collected, record, damage)

    if options.shares_by_damage:
        data = calibration_data(reference, options.data)
        _let_go()
        return auto_plan(reference, data, options.heldout_sequences, budget, chosen)
    return on_first(lambda: chosen(budget))


def _let_go() -> None:
    """Free the sharded model of the pass before: its modules refer to one another."""
    gc.collect()


def answer(options: Options, nproc: int, nnodes: int) -> str | None:
    """Return the table that `--estimate` asks for; None without that option."""
    if not options.cost.estimate:
        return None
    kinds, ranks = options.budget.kinds, nproc * nnodes
    given, data, cost = options.given, options.data, options.cost
    return estimate_text(options.model, given, data, cost, ranks, kinds, options.local)


STAGE = Stage("prune", "Calibrate, plan and apply in one.", Options, run, check, answer=answer)

if __name__ == "__main__":
    STAGE.main()
