"""Step folders: which of them are whole; saving, loading, verifying and purging them.

A step is a folder `step-N` with `.metadata`, `checksums.json` and every file that the latter
lists. It is written under a temporary name and renamed when it is whole. To delete it, it is
renamed first. So at any moment `step-N` is a whole step, or is not there.

The module imports torch only where it saves or loads, because checks before work starts use it.
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
    return max(whole_steps(folder), default=None)


def is_whole(step: Path) -> bool:
    """Return whether a step folder has every file that its `checksums.json` lists, none empty."""
    try:
        names = read_checksums(step)
        return METADATA in names and all((step / name).stat().st_size > 0 for name in names)
    except (UserError, OSError):
        return False


def verify_step(step: Path, first: int = 0, stride: int = 1) -> None:
    """Check the hash of every file of a step; raise `UserError` naming the first that differs.

    Args:
        step: the step folder.
        first: the first file to read, so that ranks can share the work.
        stride: read every `stride`-th file from `first` on.
    """
    hashes = read_checksums(step)
    if METADATA not in hashes:
        raise UserError(f"{step / CHECKSUMS} does not list {METADATA}: use another step")
    for name in sorted(hashes)[first::stride]:
        check_file(step, name, hashes)


def purge(folder: Path, keep: int) -> None:
    """Delete all but the last `keep` whole steps, and temporary folders of jobs that were killed.

    Call it on one rank, while nobody saves. Step folders that are not whole are neither counted nor
    deleted, because a person may want to look at them.

    Args:
        folder: the checkpoint folder.
        keep: how many whole steps to keep; 0 keeps all.
    """
    for leftover in Path(folder).glob(f"{_TEMPORARY}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    stale = whole_steps(folder)[:-keep] if keep > 0 else []
    for step in stale:
        _delete(step_folder(folder, step))


def set_aside(step: Path, name: Path) -> None:
    """Rename a step folder to `name`, so that it no longer counts as a step; replace `name`.

    Raises:
        UserError: the file system refuses.
    """
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
        folder: the checkpoint folder, on a file system that all ranks share; made if missing.
        step: the step's number; an existing folder of this step is replaced in one move.
        extra_files: content of small files to lie in the step, by name; rank 0's are written.
        process_group: the ranks that save together; None for all.
        read: returns the content of a meta-device entry, by its flat name, when it is written. So
            a state larger than memory can be saved, one tensor at a time.
        alone: save in this process by itself, even if a process group exists.

    Raises:
        UserError: raised on every rank if any rank cannot write; nothing is left behind.
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

    A rank compares the files that it reads with their hashes first. Entries that only the step has
    are ignored.

    Args:
        state_dict: what to load; the step must hold every entry, in its shape.
        step: the step folder.
        process_group: the ranks that load together; None for all.
        alone: load in this process by itself, even if a process group exists.
        optional: flat names of entries that keep their present value if the step lacks them.

    Raises:
        UserError: raised on every rank if any rank finds a part damaged, hostile or missing.
    """
    from flame.process.peers import Peers
    from flame.storage.safe_reader import read_checkpoint

    read_checkpoint(state_dict, Path(step), Peers(process_group, alone), optional)


def _numbers(folder: Path) -> list[int]:
    """Return the numbers of all folders named `step-N`, whole or not, increasing."""
    try:
        names = [entry.name for entry in os.scandir(folder) if entry.is_dir()]
    except OSError:
        return []
    matches = [_STEP.fullmatch(name) for name in names]
    return sorted(int(match[1]) for match in matches if match)


def _publish(temporary: Path, final: Path) -> None:
    """Rename a finished folder to its final name, replacing an older folder in the same instant."""
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
    """Rename a step, so that it stops being one at once, then delete it."""
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
