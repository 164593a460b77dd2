"""What can be wrong with a sweep, checked before its first process starts."""

import math
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from flame.checkpoint.reference import vocabulary_size
from flame.errors import UserError
from flame.options import words
from launch.sweeping.folder import FORMAT
from launch.sweeping.options import Options
from launch.sweeping.points import Point
from launch.sweeping.work import CONTINUED

if TYPE_CHECKING:
    from flame.checkpoint.reference import ModelReference
    from pruning import calibrate

SAVE_EVERY = 16
"""Calibration sequences between resume points."""

STATES_OF_TRAINING = 4
"""Models of fp32 weights that a recovery writes: weights, two moments, and a merged model."""


def check(options: Options, world_size: int = 1) -> None:
    """Raise UserError for the first thing that would fail later."""
    from flame.checkpoint.reference import resolve
    from flame.process.atomic_output import check_file_output

    options.check()
    reference = resolve(options.model)
    _check_points(options, reference)
    options.folder.check(settings(options, reference), options.overwrite, reference.folder)
    if options.json is not None:
        check_file_output(options.json, overwrite=True, inside=reference.folder)
    _check_space(options, reference, world_size)
    _check_text(options, reference)
    if options.needing:
        _check_calibration(options, world_size)
    if options.recovery is not None:
        _check_recovery(options)


def settings(options: Options, reference: "ModelReference") -> dict[str, Any]:
    """What the points of a folder have in common; methods and ratios may be added later."""
    from flame.checkpoint.fingerprint import fingerprint
    from flame.recipe import read_tables

    recovery = options.recovery
    return {
        "format": FORMAT,
        "model": fingerprint(reference.config, reference.source()),
        "calibration": words(options.data),
        "budget": list(options.budget_words),
        "heldout": asdict(options.text),
        "dtype": options.dtype,
        "recovery": recovery and read_tables(recovery.recipe),
        "overrides": recovery and list(recovery.overrides),
    }


def _check_points(options: Options, reference: "ModelReference") -> None:
    """Refuse a point that cannot be planned, and two that would be the same model."""
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


def _widths(options: Options, point: Point, reference: "ModelReference") -> Any:
    """What a point keeps of each space; UserError if its method or budget cannot."""
    from pruning import prune
    from pruning.planning.choose import check_budget

    pruning = prune.STAGE.parse([options.model, "", *options.budget_words, *point.words])
    widths = check_budget(pruning.budget, reference.config, pruning.method)
    # Heads of all layers together are a finer measure than those of one.
    shared = pruning.budget.allocate == "model" and "head" in widths
    return tuple(sorted(widths.items())), point.ratio if shared else None


def _check_text(options: Options, reference: "ModelReference") -> None:
    from launch.evaluation.heldout_text import check_text, heldout_text

    text = heldout_text(reference, options.text)
    check_text(text, vocabulary_size(reference.config), from_recipe=not options.text.data)


def calibration(options: Options) -> "calibrate.Options":
    """The options of `slimstate calibrate` for the statistics of a sweep."""
    from pruning import calibrate

    return calibrate.Options(
        model=options.model,
        stats=options.folder.statistics,
        methods=options.needing,
        save_every=SAVE_EVERY,
        data=options.data,
    )


def _check_calibration(options: Options, world_size: int) -> None:
    from pruning import calibrate

    calibrate.check(replace(calibration(options), overwrite=True), world_size)


def _check_recovery(options: Options) -> None:
    """Check the training of the dense model, which is that of every pruned one but larger."""
    from flame import train

    assert options.recovery is not None
    out = options.folder.models(CONTINUED) / "recovered"
    train.check(train.STAGE.parse(options.recovery.words(options.model, out)), 1)


def _check_space(options: Options, reference: "ModelReference", world_size: int) -> None:
    """Room for the models that are on the disk at once."""
    from flame.checkpoint.convert import check_space
    from flame.checkpoint.source import total_bytes

    source = reference.source()
    parameters = sum(math.prod(source.info(name).shape) for name in source.names())
    recovered = 0 if options.recovery is None else STATES_OF_TRAINING * 4 * parameters
    at_once = len(options.names) if options.keep else min(world_size, len(options.names))
    check_space(options.out.absolute(), at_once * (total_bytes(source) + recovered))
