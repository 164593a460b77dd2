"""Step folders: which are whole, saving and loading one, verifying, purging.

A step is a folder `step-N` with `.metadata`, `checksums.json` and every file that the latter
lists. It is written under a temporary name and renamed when whole, and deleted by renaming it
first, so at any moment `step-N` is a whole step or is not there.

Nothing at the top of this module imports torch: the checks before work start use it.
"""

import os
import re
import shutil
import uuid
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flame.errors import UserError
from flame.process.swap import exchange
from flame.storage.checksums import CHECKSUMS, METADATA, check_file, read_checksums

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup

_STEP = re.compile(r"step-(0|[1-9]\d*)")
_TEMPORARY = "tmp-"


def step_folder(folder: Path, step: int) -> Path:
    """Where step `step` of the checkpoint folder `folder` lies."""
    return Path(folder) / f"step-{step}"


def whole_steps(folder: Path) -> list[int]:
    """The whole steps of a checkpoint folder, in increasing order; sizes are checked, no hashes."""
    return [step for step in _numbers(folder) if is_whole(step_folder(folder, step))]


def broken_steps(folder: Path) -> list[str]:
    """The names of the step folders that are not whole."""
    names = [f"step-{step}" for step in _numbers(folder)]
    return [name for name in names if not is_whole(Path(folder) / name)]


def latest_whole_step(folder: Path) -> int | None:
    """The highest whole step, or None."""
    return max(whole_steps(folder), default=None)


def is_whole(step: Path) -> bool:
    """Whether a step folder has `.metadata` and every file that its `checksums.json` lists."""
    try:
        names = read_checksums(step)
        return METADATA in names and all((step / name).stat().st_size > 0 for name in names)
    except (UserError, OSError):
        return False


def verify_step(step: Path, first: int = 0, stride: int = 1) -> None:
    """Check the hash of every file of a step; raise `UserError` naming the first that differs.

    Ranks share the work: with `first` and `stride` only every `stride`-th file is read.
    """
    hashes = read_checksums(step)
    if METADATA not in hashes:
        raise UserError(f"{step / CHECKSUMS} does not list {METADATA}: use another step")
    for name in sorted(hashes)[first::stride]:
        check_file(step, name, hashes)


def purge(folder: Path, keep: int) -> None:
    """Delete all but the last `keep` whole steps (0 keeps all), and what killed savers left.

    Call it on one rank, while nobody saves. Folders that are not whole are neither counted nor
    deleted: a person may want to look at them.
    """
    for leftover in Path(folder).glob(f"{_TEMPORARY}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    stale = whole_steps(folder)[:-keep] if keep > 0 else []
    for step in stale:
        _delete(step_folder(folder, step))


def set_aside(step: Path, name: Path) -> None:
    """Rename a step folder to what is none, so that it is neither counted nor deleted."""
    try:
        shutil.rmtree(name, ignore_errors=True)
        os.rename(step, name)
    except OSError as error:
        raise UserError(f"cannot rename {step}: {error.strerror}") from error


def save_step(
    state_dict: Mapping[str, Any],
    folder: Path,
    step: int,
    extra_files: Mapping[str, bytes] | None = None,
    process_group: "ProcessGroup | None" = None,
    *,
    read: "Callable[[str], Tensor] | None" = None,
    alone: bool = False,
) -> Path:
    """Save `state_dict` as `folder/step-N` and return that path. Collective unless `alone`.

    Args:
        state_dict: as `torch.distributed.checkpoint.save` takes it, nested and sharded or not.
        folder: the checkpoint folder, made if it is not there; on a file system of all ranks.
        step: an existing folder of this step is replaced in one move.
        extra_files: content of small files to lie in the step (rank 0's are written).
        read: gives the content of meta-device entries by their flat name when they are written,
            so that a state larger than memory can be saved (one tensor at a time).
        alone: this process saves by itself, even where a process group exists.

    Raises:
        UserError: a rank cannot write; nothing is left behind, on any rank.
    """
    from flame.checkpoint.writer import write_checkpoint
    from flame.process.peers import Peers

    peers = Peers(process_group, alone)
    final = step_folder(folder, step)
    temporary = Path(folder) / f"{_TEMPORARY}{step}-{peers.from_first(uuid.uuid4().hex[:8])}"
    try:
        write_checkpoint(state_dict, temporary, dict(extra_files or {}), peers, read)
        peers.agree(lambda: _publish(temporary, final) if peers.is_first else None)
    except BaseException:
        if peers.is_first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def load_step(
    state_dict: dict[str, Any],
    step: Path,
    process_group: "ProcessGroup | None" = None,
    *,
    alone: bool = False,
    optional: Collection[str] = (),
) -> None:
    """Load a step into `state_dict` in place, resharding as needed. Collective unless `alone`.

    Every entry of `state_dict` must be in the step, with its shape, but for `optional` ones, by
    their flat names, which then stay as they are; entries that are only in the step are left out.
    The files that a rank reads are checked against their hashes first.

    Raises:
        UserError: on every rank, where any rank finds a damaged, hostile or missing part.
    """
    from flame.process.peers import Peers
    from flame.storage.safe_reader import read_checkpoint

    read_checkpoint(state_dict, Path(step), Peers(process_group, alone), optional)


def _numbers(folder: Path) -> list[int]:
    try:
        names = [entry.name for entry in os.scandir(folder) if entry.is_dir()]
    except OSError:
        return []
    matches = [_STEP.fullmatch(name) for name in names]
    return sorted(int(match[1]) for match in matches if match)


def _publish(temporary: Path, final: Path) -> None:
    """Give a finished folder its name; an older folder of that name goes in the same instant."""
    try:
        _sync_folder(temporary)
        if not final.exists():
            os.rename(temporary, final)
        elif exchange(temporary, final):
            shutil.rmtree(temporary)
        else:
            _delete(final)
            os.rename(temporary, final)
        _sync_folder(final.parent)
    except OSError as error:
        raise UserError(f"cannot write {final}: {error.strerror}") from error


def _delete(step: Path) -> None:
    """Delete a step: it stops being a step at once, whenever the deletion is cut short."""
    doomed = step.parent / f"{_TEMPORARY}{step.name.removeprefix('step-')}-old"
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(step, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
