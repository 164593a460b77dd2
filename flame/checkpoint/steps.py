"""Step folders: which of them are whole; verifying, deleting and purging them.

A step is a folder `step-N` with `.metadata`, `checksums.json` and every file that the latter
lists. It is written under a temporary name and renamed when it is whole. To delete it, it is
renamed first. So at any moment `step-N` is a whole step, or is not there.

The module imports no torch, because checks before work starts use it.
"""

import os
import re
import shutil
from pathlib import Path

from flame.errors import UserError
from flame.storage.checksums import CHECKSUMS, METADATA, check_file, read_checksums

_STEP = re.compile(r"step-(0|[1-9]\d*)")
TEMPORARY = "tmp-"
"""Beginning of the names of step folders that are being written or deleted."""


def step_folder(folder: Path, step: int) -> Path:
    """Return the path of step `step` in the checkpoint folder `folder`."""
    return Path(folder) / f"step-{step}"


def whole_steps(folder: Path) -> list[int]:
    """Return the numbers of the whole steps of a checkpoint folder, increasing; read no hashes."""
    return [step for step in _numbers(folder) if is_whole(step_folder(folder, step))]


def broken_steps(folder: Path) -> list[str]:
    """Return the names of the step folders in a checkpoint folder that are not whole."""
    names = [f"step-{step}" for step in _numbers(folder)]
    return [name for name in names if not is_whole(Path(folder) / name)]


def latest_whole_step(folder: Path) -> int | None:
    """Return the highest whole step of a checkpoint folder, or None if there is none."""
    newest_first = reversed(_numbers(folder))
    return next((step for step in newest_first if is_whole(step_folder(folder, step))), None)


def is_whole(step: Path) -> bool:
    """Return whether a step folder has every file that its `checksums.json` lists, none empty."""
    try:
        names = read_checksums(step)
        return METADATA in names and all((step / name).stat().st_size > 0 for name in names)
    except (UserError, OSError):
        return False


def is_foreign(step: Path) -> bool:
    """Return whether another program wrote a step: DCP's index is there, and no hashes.

    A step without hashes beside steps that have some is ours, and damaged.
    """
    if not (step / METADATA).is_file():
        return False
    return not any((other / CHECKSUMS).exists() for other in (step, *step.parent.glob("step-*")))


def foreign_steps(folder: Path) -> list[int]:
    """Return the numbers of the steps in a folder that another program wrote, increasing."""
    return [step for step in _numbers(folder) if is_foreign(step_folder(folder, step))]


def verify_step(step: Path) -> None:
    """Check the hash of every file of a step; raise `UserError` naming the first that differs."""
    hashes = read_checksums(step)
    if METADATA not in hashes:
        raise UserError(f"{step / CHECKSUMS} does not list {METADATA}: use another step")
    for name in sorted(hashes):
        check_file(step, name, hashes)


def purge(folder: Path, keep: int) -> None:
    """Delete all but the last `keep` whole steps (0 keeps all), and leftovers of killed jobs.

    Call it on one rank, while nobody saves. Step folders that are not whole are neither counted nor
    deleted, because a person may want to look at them.
    """
    for leftover in Path(folder).glob(f"{TEMPORARY}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    stale = whole_steps(folder)[:-keep] if keep > 0 else []
    for step in stale:
        delete(step_folder(folder, step))


def set_aside(step: Path, name: Path) -> None:
    """Rename a step folder to `name`, so that it is no step any more; replace an old `name`."""
    try:
        shutil.rmtree(name, ignore_errors=True)
        os.rename(step, name)
    except OSError as error:
        raise UserError(f"cannot rename {step}: {error.strerror}") from error


def _numbers(folder: Path) -> list[int]:
    """Return the numbers of all folders named `step-N`, whole or not, increasing."""
    try:
        names = [entry.name for entry in os.scandir(folder) if entry.is_dir()]
    except OSError:
        return []
    matches = [_STEP.fullmatch(name) for name in names]
    return sorted(int(match[1]) for match in matches if match)


def delete(step: Path) -> None:
    """Rename a step, so that it stops being one at once, then delete it."""
    doomed = step.parent / f"{TEMPORARY}{step.name.removeprefix('step-')}-old"
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(step, doomed)
    shutil.rmtree(doomed, ignore_errors=True)
