"""Stage `sweep`: prune models by every method at every ratio, and measure all.

All processes calibrate together, once for each model. Then each process takes one point at a time
from a list. A second call measures only what is missing.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from flame.checkpoint.reference import resolve
from flame.errors import UserError
from flame.process.atomic_output import writer_lock
from flame.process.distributed import from_rank_zero, process_group
from flame.process.peers import on_first
from flame.stage import Stage
from launch.evaluation.heldout_text import HeldoutText, heldout_text
from launch.sweeping.announcer import Announcer
from launch.sweeping.checks import calibration, check, needing, settings
from launch.sweeping.command import read_options
from launch.sweeping.measuring import Dense, in_memory
from launch.sweeping.models import begin
from launch.sweeping.options import Options
from launch.sweeping.progress import telling
from launch.sweeping.results import write_results
from launch.sweeping.work import Work, alone
from pruning import calibrate
from pruning.calibrate import kinds_of
from pruning.calibration.stats_file import META_FILE, read_meta


@dataclass(frozen=True)
class SweepStage(Stage[Options]):
    """The stage, whose command line may name a TOML file that has the rest."""

    def parse(self, argv: Sequence[str], others: Sequence[str] = ()) -> Options:
        return read_options(argv, self.program, others)


def run(options: Options) -> None:
    """Measure all points and write the results. Collective for the calibrations only.

    Raises:
        UserError: a calibration failed, or points did (on rank 0, after the others are written).
    """
    import flame.register  # noqa: F401

    first = int(os.environ.get("RANK", "0")) == 0
    with _locks(options) if first else nullcontext():
        with process_group():
            on_first(lambda: begin(options.out, options.models))
            for member in options.members:
                _begin(member)
        texts = [heldout_text(resolve(each.model), each.text) for each in options.members]
        announcer = Announcer(options) if first else None
        with _telling(options) if first else nullcontext():
            with alone():
                for member, text in zip(options.members, texts, strict=True):
                    _measure(member, text, announcer)
            if announcer is not None:
                announcer.wait()
        if first:
            write_results(options, texts)


@contextmanager
def _locks(options: Options) -> Iterator[None]:
    """Keep the folders of the sweep to this job."""
    with ExitStack() as stack:
        for place in dict.fromkeys([options.out, *(each.out for each in options.members)]):
            stack.enter_context(writer_lock(place))
        yield


@contextmanager
def _telling(options: Options) -> Iterator[None]:
    with ExitStack() as stack:
        for member in options.members:
            stack.enter_context(telling(member.folder, member.wanted))
        yield


def _begin(member: Options) -> None:
    """Make the folder of a model's sweep ready, and calibrate. Collective."""
    facts = settings(member, resolve(member.model))
    on_first(lambda: member.folder.begin(facts, member.overwrite))
    try:
        _calibrate(member)
    except UserError:
        on_first(member.folder.withdraw)
        raise


def _calibrate(options: Options) -> None:
    """Write or complete the statistics that the sweep needs and does not have yet. Collective."""
    # Only rank 0 looks: if a few ranks raised, the others would hang in the broadcast.
    how = from_rank_zero(on_first(lambda: _how_to_calibrate(options)))
    if how is not None:
        calibrate.run(replace(calibration(options), **how))


def _how_to_calibrate(options: Options) -> dict[str, bool] | None:
    """Return the options to calibrate with in this folder; None if nothing is left to do."""
    config = resolve(options.model).config
    methods = tuple(needing(options, config))
    if not methods or options.stats is not None:
        return None
    statistics = options.folder.statistics
    if not (statistics / META_FILE).is_file():
        return {}
    meta = read_meta(statistics)
    wanted = {kind.__name__ for kind in kinds_of(methods, config)}
    if meta.is_complete:
        return None if wanted <= set(meta.statistics) else {"overwrite": True}
    return {"resume": True} if wanted == set(meta.statistics) else {"overwrite": True}


def _measure(options: Options, text: HeldoutText, announcer: Announcer | None) -> None:
    """Measure the points of a model that no other process has taken."""
    work = Work(
        folder=options.folder,
        model=options.model,
        text=in_memory(text),
        dense=Dense(options.model, options.dtype),
        dtype=options.dtype,
        statistics=options.statistics,
        recovery=options.recovery,
        budget_words=options.budget_words,
        data=options.data,
        keep=options.keep,
    )
    points, wanted = {point.file_name: point for point in options.points}, options.wanted
    for name in options.folder.open_points(wanted):
        work.measure(name, wanted[name], points)
        if announcer is not None:
            announcer.news()


STAGE: Stage[Any] = SweepStage(
    "sweep",
    "Prune a model, or several, by many methods and ratios, and measure all.",
    Options,
    run,
    check,
    epilog="slimstate sweep --config SWEEP.toml takes models, OUT and options from a file, "
    "whose keys are the options' names; options of the command line come after its own.",
)

if __name__ == "__main__":
    STAGE.main()
