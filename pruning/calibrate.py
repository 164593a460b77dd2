"""Stage `calibrate`: sum a model's statistics over training data."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from flame.checkpoint.fingerprint import fingerprint, finite_parts
from flame.checkpoint.foreign import GIVEN, GivenFiles
from flame.checkpoint.reference import ModelReference, check_destination
from flame.checkpoint.verify import verify_model
from flame.errors import UserError
from flame.hugging_face.config_file import vocabulary_size
from flame.options import argument, group, option
from flame.process.atomic_output import writer_lock
from flame.process.distributed import process_group, rank, world_size
from flame.process.output_checks import check_output
from flame.process.peers import Peers, on_first
from flame.stage import Stage
from pruning.adapters import adapter_for
from pruning.adapters.interface import Config
from pruning.calibration.collect import Resumed, ResumePoints, collect
from pruning.calibration.data import (
    CalibrationData,
    calibration_data,
    check_data,
    warn_of_few_tokens,
)
from pruning.calibration.gradients import check_gradients
from pruning.calibration.resuming import check_resume, offer_resume, saying_how_to_go_on
from pruning.calibration.stats_file import (
    AddGradient,
    Collected,
    Meta,
    check_model,
    gradient_reader,
    load_statistics,
    read_meta,
    save_statistics,
    writing_statistics,
)
from pruning.cost.table import EstimateOptions, estimate_text
from pruning.methods import METHODS
from pruning.options import MODEL_HELP, OVERWRITE_HELP, DataOptions
from pruning.planning.plan import Plan, check_fingerprint, check_plan
from pruning.planning.plan_file import read_plan, with_loaded_tensors
from pruning.repair.gates import refits
from pruning.repair.repaired import choice_mark
from pruning.statistics import GateMoments, OutputEquations, Statistic


@dataclass(frozen=True)
class Options:
    model: str = argument("MODEL", MODEL_HELP)
    stats: Path = argument("STATS", "folder to write")
    methods: tuple[str, ...] = option(
        tuple(METHODS), "collect what these methods need", metavar="A,B"
    )
    save_every: int = option(
        0, "sequences between resume points; 0 saves at the end only", least=0, metavar="N"
    )
    plan: Path | None = option(
        None, "sum what plan --repair-stats needs for this plan, not what methods need"
    )
    resume: bool = option(False, "finish a calibration that was cut short")
    overwrite: bool = option(False, OVERWRITE_HELP)
    data: DataOptions = group(DataOptions, "calibration")
    cost: EstimateOptions = group(EstimateOptions, "estimate")
    given: GivenFiles = group(GivenFiles, GIVEN)

    def kinds(self, config: Config) -> tuple[type[Statistic], ...]:
        """The statistics to collect of a model.

        Raises:
            UserError: no method needs any, one is unknown, or methods are given beside a plan.
        """
        if self.plan is None:
            return kinds_of(self.methods, config)
        if self.methods != tuple(METHODS):
            raise UserError(
                "--methods is for what methods choose by, --plan for what was chosen: give one"
            )
        return (OutputEquations,)

    def read_plan(self) -> Plan | None:
        """The plan whose pruned layers are to run, with its new tensors; None without one."""
        if self.plan is None:
            return None
        return with_loaded_tensors(read_plan(self.plan), self.plan.absolute().parent)


def check(options: Options, world_size: int = 1) -> None:
    """Raise UserError if the model, the output, the data or a resume cannot work."""
    reference = options.given.resolve(options.model)
    kinds = options.kinds(reference.config)
    if not (options.resume or options.overwrite):
        offer_resume(options.stats)
    check_destination(reference, options.stats, options.overwrite or options.resume)
    adapter_for(reference.config)
    plan = options.read_plan()
    if plan is not None:
        check_plan(plan, reference.config, f"plan {options.plan}")
    check_gradients(kinds, reference.config)
    data = calibration_data(reference, options.data)
    if options.resume:
        asked = {
            "data": data.record(),
            "seq_len": data.seq_len,
            "seed": data.config.seed,
            "wanted": data.sequences,
            "statistics": sorted(kind.__name__ for kind in kinds),
            "plan": "" if plan is None else choice_mark(plan),
        }
        check_resume(options.stats, asked)
    check_data(data, vocabulary_size(reference.config), world_size)


def run(options: Options) -> None:
    """Write the statistics. Collective; starts a process group unless one is running."""
    with process_group(), ExitStack() as stack:
        on_first(lambda: stack.enter_context(_claimed(options)))
        reference = options.given.resolve(options.model)
        data = calibration_data(reference, options.data)
        with saying_how_to_go_on(options.stats):
            plan = Peers().agree(options.read_plan)
            collected, meta = calibrate(
                reference, options.kinds(reference.config), data, options, plan
            )

        def save() -> None:
            save_statistics(options.stats, collected, meta, overwrite=True, locked=True)
            # Here and not at the end, so that a job which is killed from now on leaves nothing.
            stack.close()
            names = ", ".join(meta.statistics)
            print(f"{options.stats}: {names} over {meta.tokens:,} tokens", flush=True)

        on_first(save)


@contextmanager
def _claimed(options: Options) -> Iterator[None]:
    """Lock the output folder inside the `with` block, so that no other job writes it."""
    with writer_lock(options.stats):
        # Another job may have ended since `check`.
        check_output(options.stats, options.overwrite or options.resume)
        yield


def calibrate(
    reference: ModelReference,
    kinds: tuple[type[Statistic], ...],
    data: CalibrationData,
    options: Options | None = None,
    plan: Plan | None = None,
) -> tuple[Collected, Meta]:
    """Return a model's statistics and their description. Collective over all ranks.

    Args:
        reference: the model.
        kinds: the statistics to collect.
        data: what to run the model on.
        options: says whether to write resume points and to resume; None for neither.
        plan: whose pruned layers to run beside the model's, the same on every rank.

    Raises:
        UserError: on every rank, if weights or activations are not finite, the data is too short,
            or the sums to resume from or the plan are another model's.
    """

    peers = Peers()
    mark = examined(reference, peers)
    if plan is not None:
        check_fingerprint(plan, mark)
    elif rank() == 0:
        warn_of_few_tokens(data, adapter_for(reference.config).spaces(reference.config))
    resumed = peers.agree(lambda: _resumed(reference, kinds, mark, options))
    return collect(reference, kinds, data, mark, _points(options), resumed, plan)


def examined(reference: ModelReference, peers: Peers) -> str:
    """Check a model's files and weights, which the ranks share; return its fingerprint."""
    verify_model(reference)
    source = peers.agree(reference.source)
    peers.go_through(finite_parts(source, rank(), world_size()))
    mark = peers.agree(lambda: fingerprint(reference.config, source) if rank() == 0 else "")
    return peers.from_first(mark)


def kinds_of(methods: tuple[str, ...], config: Config) -> tuple[type[Statistic], ...]:
    """Return the statistics that methods and a refit of the model's gates need.

    Raises:
        UserError: no statistics are needed, or a method is unknown.
    """
    for name in methods:
        if name not in METHODS:
            raise UserError(f"unknown method {name!r}: choose from {', '.join(METHODS)}")
    kinds = {kind.__name__: kind for name in methods for kind in METHODS[name].needs}
    if refits(adapter_for(config).spaces(config)):
        kinds[GateMoments.__name__] = GateMoments
    if not kinds:
        raise UserError(f"{', '.join(methods)} needs no statistics: there is nothing to calibrate")
    return tuple(kinds[name] for name in sorted(kinds))


def _resumed(
    reference: ModelReference,
    kinds: tuple[type[Statistic], ...],
    mark: str,
    options: Options | None,
) -> Resumed | None:
    """What to go on from, with the sums on rank 0 alone; None unless the options ask to resume."""
    if options is None or not options.resume:
        return None

    meta = read_meta(options.stats)
    check_model(options.stats, meta, mark)
    spaces = adapter_for(reference.config).spaces(reference.config)
    collected = load_statistics(options.stats, spaces, kinds) if rank() == 0 else {}
    return Resumed(collected, meta, gradient_reader(options.stats))


def _points(options: Options | None) -> ResumePoints | None:
    if options is None or options.save_every == 0:
        return None

    def write(collected: Collected, meta: Meta) -> AbstractContextManager[AddGradient]:
        return writing_statistics(options.stats, collected, meta, overwrite=True, locked=True)

    return ResumePoints(options.save_every, write)


def answer(options: Options, nproc: int, nnodes: int) -> str | None:
    """Return the table that `--estimate` asks for; None without that option."""
    if not options.cost.estimate:
        return None
    ranks = nproc * nnodes
    return estimate_text(options.model, options.given, options.data, options.cost, ranks)


STAGE = Stage(
    "calibrate", "Sum a model's statistics over training data.", Options, run, check, answer=answer
)

if __name__ == "__main__":
    STAGE.main()
