"""Calibrations that were cut short: what is offered, what must agree, what is said at a signal."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flame.errors import UserError
from flame.process.atomic_output import clear_leftovers
from flame.process.distributed import rank
from flame.process.ending import signal_received
from pruning.calibration.stats_file import META_FILE, read_meta


def offer_resume(stats: Path) -> None:
    """Raise UserError, with the way to go on, if `stats` was begun and not finished."""
    if not (stats / META_FILE).is_file():
        return
    meta = read_meta(stats)
    if not meta.is_complete:
        raise UserError(
            f"{stats} exists, and holds {meta.sequences} of {meta.wanted} sequences of a "
            "calibration that was cut short: pass --resume to go on, or --overwrite to begin again"
        )


def check_resume(stats: Path, asked: Mapping[str, Any]) -> None:
    """Raise UserError unless `stats` can go on with what is asked for, by fields of `Meta`."""
    meta = read_meta(stats)
    if meta.is_complete:
        # Its job may have been killed after the last word.
        clear_leftovers(stats)
        raise UserError(f"{stats} is complete: there is nothing to resume")
    for key, value in asked.items():
        if getattr(meta, key) != value:
            raise UserError(
                f"{stats} was begun with {key} {getattr(meta, key)}, not {value}: resume it with "
                "the options that it was begun with"
            )


@contextmanager
def saying_how_to_go_on(stats: Path) -> Iterator[None]:
    """Say at a signal in the block what is kept of a calibration, on rank 0."""
    try:
        yield
    finally:
        if signal_received() and rank() == 0:
            print(f"stopped; {_kept(stats)}", flush=True)


def _kept(stats: Path) -> str:
    if not (stats / META_FILE).is_file():
        return "nothing is kept (--save-every N keeps what was done)"
    meta = read_meta(stats)
    return f"{meta.sequences} of {meta.wanted} sequences are kept: --resume goes on from there"
