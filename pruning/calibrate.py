"""Stage `calibrate`: sum a model's statistics over training data."""

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from flame.checkpoint.fingerprint import fingerprint, finite_parts
from flame.checkpoint.foreign import GIVEN, GivenFiles
from flame.checkpoint.reference import ModelReference, check_destination, vocabulary_size
from flame.checkpoint.verify import verify_model
from flame.errors import UserError
from flame.options import argument, group, option
from flame.process.atomic_output import clear_leftovers, writer_lock
from flame.process.distributed import process_group, rank, world_size
from flame.process.ending import signal_received
from flame.process.output_checks import check_output
from flame.process.peers import Peers, on_first
from flame.stage import Stage
from pruning.adapters import adapter_for
from pruning.calibration.collect import Resumed, ResumePoints, collect
from pruning.calibration.data import CalibrationData, calibration_data, check_data
from pruning.calibration.gradients import check_gradients
from pruning.calibration.stats_file import (
    META_FILE,
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
from pruning.methods import METHODS
from pruning.options import MODEL_HELP, OVERWRITE_HELP, DataOptions
from pruning.spaces import Space
from pruning.statistics import Statistic

log = logging.getLogger(__name__)


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
    resume: bool = option(False, "finish a calibration that was cut short")
    overwrite: bool = option(False, OVERWRITE_HELP)
    data: DataOptions = group(DataOptions, "calibration")
    given: GivenFiles = group(GivenFiles, GIVEN)


def check(options: Options, world_size: int = 1) -> None:
    """Raise UserError if the model, the output, the data or a resume cannot work."""
    kinds_of(options.methods)
    reference = options.given.resolve(options.model)
    _offer_resume(options)
    check_destination(reference, options.stats, options.overwrite or options.resume)
    adapter_for(reference.config)
    check_gradients(kinds_of(options.methods), reference.config)
    data = calibration_data(reference, options.data)
    if options.resume:
        _check_resume(options, data)
    check_data(data, vocabulary_size(reference.config), world_size)


def run(options: Options) -> None:
    """Write the statistics. Collective; starts a process group unless one is running."""
    with process_group(), ExitStack() as stack:
        on_first(lambda: stack.enter_context(_claimed(options)))
        reference = options.given.resolve(options.model)
        data = calibration_data(reference, options.data)
        with _saying_how_to_go_on(options):
            collected, meta = calibrate(reference, kinds_of(options.methods), data, options)

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
) -> tuple[Collected, Meta]:
    """Return a model's statistics and their description. Collective over all ranks.

    Args:
        reference: the model.
        kinds: the statistics to collect.
        data: what to run the model on.
        options: says whether to write resume points and to resume; None for neither.

    Raises:
        UserError: on every rank, if weights or activations are not finite, the data is too short,
            or the sums to resume from are another model's.
    """

    peers = Peers()
    mark = examined(reference, peers)
    if rank() == 0:
        warn_of_few_tokens(data, adapter_for(reference.config).spaces(reference.config))
    resumed = peers.agree(lambda: _resumed(reference, kinds, mark, options))
    return collect(reference, kinds, data, mark, _points(options), resumed)


def examined(reference: ModelReference, peers: Peers) -> str:
    """Check a model's files and weights, which the ranks share; return its fingerprint."""
    verify_model(reference)
    source = peers.agree(reference.source)
    peers.go_through(finite_parts(source, rank(), world_size()))
    mark = peers.agree(lambda: fingerprint(reference.config, source) if rank() == 0 else "")
    return peers.from_first(mark)


def warn_of_few_tokens(data: CalibrationData, spaces: list[Space]) -> None:
    """Log a warning if there are fewer calibration tokens than key channels in a head."""
    tokens = data.sequences * data.seq_len
    channels = max((space.head_dim for space in spaces if space.kind == "key"), default=0)
    if tokens < channels:
        log.warning(
            "slimstate: warning: %d calibration tokens for %d key channels a head: the Gram "
            "matrix of the activations has no full rank, so the choice among the channels beyond "
            "its rank is arbitrary: give more (--sequences, --seq-len)",
            tokens,
            channels,
        )


def kinds_of(methods: tuple[str, ...]) -> tuple[type[Statistic], ...]:
    """Return the statistics that methods need; raise UserError if none or for an unknown name."""
    for name in methods:
        if name not in METHODS:
            raise UserError(f"unknown method {name!r}: choose from {', '.join(METHODS)}")
    kinds = {kind.__name__: kind for name in methods for kind in METHODS[name].needs}
    if not kinds:
        raise UserError(f"{', '.join(methods)} needs no statistics: there is nothing to calibrate")
    return tuple(kinds[name] for name in sorted(kinds))


def _offer_resume(options: Options) -> None:
    """Raise UserError if the statistics were begun before and the options do not say what to do."""
    if options.resume or options.overwrite or not (options.stats / META_FILE).is_file():
        return
    meta = read_meta(options.stats)
    if not meta.is_complete:
        raise UserError(
            f"{options.stats} exists, and holds {meta.sequences} of {meta.wanted} sequences of a "
            "calibration that was cut short: pass --resume to go on, or --overwrite to begin again"
        )


@contextmanager
def _saying_how_to_go_on(options: Options) -> Iterator[None]:
    """Say at a signal in the block what is kept of a calibration, on rank 0."""
    try:
        yield
    finally:
        if signal_received() and rank() == 0:
            _say_what_is_kept(options)


def _say_what_is_kept(options: Options) -> None:
    if not (options.stats / META_FILE).is_file():
        kept = "nothing is kept (--save-every N keeps what was done)"
    else:
        meta = read_meta(options.stats)
        kept = f"{meta.sequences} of {meta.wanted} sequences are kept: --resume goes on from there"
    print(f"stopped; {kept}", flush=True)


def _check_resume(options: Options, data: CalibrationData) -> None:
    meta = read_meta(options.stats)
    if meta.is_complete:
        # Its job may have been killed after the last word.
        clear_leftovers(options.stats)
        raise UserError(f"{options.stats} is complete: there is nothing to resume")
    asked = {
        "data": data.record(),
        "seq_len": data.seq_len,
        "seed": data.config.seed,
        "wanted": data.sequences,
        "statistics": sorted(kind.__name__ for kind in kinds_of(options.methods)),
    }
    for key, value in asked.items():
        if getattr(meta, key) != value:
            raise UserError(
                f"{options.stats} was begun with {key} {getattr(meta, key)}, not {value}: resume "
                "it with the options that it was begun with"
            )


def _resumed(
    reference: ModelReference,
    kinds: tuple[type[Statistic], ...],
    mark: str,
    options: Options | None,
) -> Resumed | None:
    """Read the sums to go on from, on every rank; None unless the options ask to resume."""
    if options is None or not options.resume:
        return None

    meta = read_meta(options.stats)
    check_model(options.stats, meta, mark)
    spaces = adapter_for(reference.config).spaces(reference.config)
    collected = load_statistics(options.stats, spaces, kinds)
    return Resumed(collected, meta, gradient_reader(options.stats))


def _points(options: Options | None) -> ResumePoints | None:
    if options is None or options.save_every == 0:
        return None

    def write(collected: Collected, meta: Meta) -> AbstractContextManager[AddGradient]:
        return writing_statistics(options.stats, collected, meta, overwrite=True, locked=True)

    return ResumePoints(options.save_every, write)


STAGE = Stage("calibrate", "Sum a model's statistics over training data.", Options, run, check)

if __name__ == "__main__":
    STAGE.main()
