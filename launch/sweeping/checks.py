"""The checks of a sweep, made before its first process starts."""

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from flame import train
from flame.checkpoint.convert import check_space
from flame.checkpoint.fingerprint import fingerprint
from flame.checkpoint.reference import ModelReference, resolve
from flame.checkpoint.source import total_bytes
from flame.errors import UserError
from flame.hugging_face.config_file import vocabulary_size
from flame.options import words
from flame.process.output_checks import check_file_output
from flame.recipe import read_tables
from launch.evaluation.heldout_text import check_text, heldout_text
from launch.sweeping.folder import FORMAT
from launch.sweeping.models import check_place_of
from launch.sweeping.options import Options
from launch.sweeping.points import Point
from launch.sweeping.work import CONTINUED
from pruning import calibrate, prune
from pruning.adapters.interface import Config
from pruning.calibration.data import calibration_data, check_data
from pruning.calibration.stats_file import check_kinds, check_model, read_meta
from pruning.options import check_no_data
from pruning.plan import needed
from pruning.planning.choose import check_budget
from pruning.planning.fitting import fitted
from pruning.statistics import Statistic

SAVE_EVERY = 16
"""Calibration sequences between resume points."""

STATES_OF_TRAINING = 4
"""Models of fp32 weights that a recovery writes: weights, two moments, and a merged model."""


def check(options: Options, world_size: int = 1) -> None:
    """Raise UserError if a point, the text, calibration, recovery or the output cannot work."""
    options.check()
    check_place_of(options.out, options.models)
    for member in options.members:
        _check_member(member, world_size)


def _check_member(options: Options, world_size: int) -> None:
    """Raise UserError if the sweep of one model cannot work."""
    reference = resolve(options.model)
    check_points(options, reference)
    options.folder.check(settings(options, reference), options.overwrite, reference.folder)
    if options.json is not None:
        check_file_output(options.json, overwrite=True, inside=reference.folder)
    _check_space(options, reference, world_size)
    text = heldout_text(reference, options.text)
    check_text(text, vocabulary_size(reference.config), from_recipe=not options.text.data)
    if options.stats is not None:
        _check_statistics(options, reference)
    elif needing(options, reference.config):
        calibrate.check(replace(calibration(options), overwrite=True), world_size)
    elif options.repairs:
        data = calibration_data(reference, options.data)
        check_data(data, vocabulary_size(reference.config), 1)
    if options.recovery is not None:
        # The training of the dense model is that of every pruned one, but larger.
        out = options.folder.models(CONTINUED) / "recovered"
        train.check(train.STAGE.parse(options.recovery.words(options.model, out)), 1)


def needing(options: Options, config: Config) -> dict[str, tuple[type[Statistic], ...]]:
    """The statistics that each method needs at some of its points; only those that need any."""
    found: dict[str, tuple[type[Statistic], ...]] = {}
    for point in options.points:
        pruning = prune.STAGE.parse([options.model, "", *options.budget_words, *point.words])
        needs = needed(pruning.method, pruning.budget, config)
        found[pruning.method.name] = tuple(
            dict.fromkeys((*found.get(pruning.method.name, ()), *needs))
        )
    return {name: needs for name, needs in found.items() if needs}


def calibration(options: Options) -> calibrate.Options:
    """Return the options of `slimstate calibrate` for the statistics of a sweep."""
    return calibrate.Options(
        model=options.model,
        stats=options.folder.statistics,
        methods=tuple(needing(options, resolve(options.model).config)),
        save_every=SAVE_EVERY,
        data=options.data,
    )


def settings(options: Options, reference: ModelReference) -> dict[str, Any]:
    """Return what all points of a folder share; methods and ratios may be added by later calls."""
    recovery = options.recovery
    return {
        "format": FORMAT,
        "model": fingerprint(reference.config, reference.source()),
        "calibration": words(options.data) if options.stats is None else _mark(options.stats),
        "budget": list(options.budget_words),
        "heldout": asdict(options.text),
        "dtype": options.dtype,
        "recovery": recovery and read_tables(recovery.recipe),
        "overrides": recovery and list(recovery.overrides),
    }


def check_points(options: Options, reference: ModelReference) -> None:
    """Raise UserError for a point that cannot be planned, and for two that are the same model."""
    seen: dict[Any, str] = {}
    for point in options.points:
        try:
            key = (point.method, point.seed, _widths(options, point, reference))
        except UserError as error:
            raise UserError(f"{point.name}: {error}") from error
        if key in seen:
            raise UserError(
                f"{seen[key]} and {point.name} keep as many channels and are the same model: "
                "leave one out, or choose a smaller --multiple-of"
            )
        seen[key] = point.name


def _widths(options: Options, point: Point, reference: ModelReference) -> Any:
    """Return a key for what a point keeps; raise UserError if method or budget do not fit."""
    pruning = prune.STAGE.parse([options.model, "", *options.budget_words, *point.words])
    if pruning.measures_gain:
        raise UserError(
            "--gain measured runs pruned models on more text than a sweep's statistics are of: "
            "sweep undo and keep, or use slimstate prune"
        )
    budget = fitted(pruning.budget, reference.config, pruning.method, reference.outer)
    widths = check_budget(budget, reference.config, pruning.method)
    # Heads of all layers together are a finer measure than those of one.
    shared = pruning.budget.allocate == "model" and "head" in widths
    return tuple(sorted(widths.items())), point.ratio if shared else None


def _check_statistics(options: Options, reference: ModelReference) -> None:
    """Raise UserError if `--stats` is not whole, of another model, or lacks what a method needs."""
    assert options.stats is not None
    if not options.repairs:
        check_no_data(options.data, options.stats)
    needs = needing(options, reference.config)
    if not needs:
        raise UserError(
            f"no method of the sweep reads statistics: leave --stats {options.stats} out"
        )
    meta = read_meta(options.stats)
    check_model(options.stats, meta, fingerprint(reference.config, reference.source()))
    for name, kinds in needs.items():
        check_kinds(options.stats, meta, kinds, name)


def _mark(stats: Path) -> dict[str, Any]:
    """What tells given statistics apart: the model, the data, and how much of it."""
    return read_meta(stats).for_plan()


def _check_space(options: Options, reference: ModelReference, world_size: int) -> None:
    """Raise UserError if the disk lacks room for the models that lie on it at one time."""
    source = reference.source()
    parameters = sum(math.prod(source.info(name).shape) for name in source.names())
    recovered = 0 if options.recovery is None else STATES_OF_TRAINING * 4 * parameters
    at_once = len(options.wanted) if options.keep else min(world_size, len(options.wanted))
    check_space(options.out.absolute(), at_once * (total_bytes(source) + recovered))
