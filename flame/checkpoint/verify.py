"""Comparing a step with its hashes once for all ranks of a job, which share its files.

Ranks that see the same files share them: all ranks for a folder that all nodes see, those of one
node for a copy on its own disk. A job that goes on with as many ranks as wrote the step gives each
rank the file that it loads afterwards.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flame.errors import UserError
from flame.process.dealing import share
from flame.process.distributed import gather_objects, rank
from flame.process.peers import Peers
from flame.storage.checksums import CHECKSUMS, METADATA, checked_parts, read_checksums
from flame.storage.compared import Identity, identity, is_compared, note_compared

if TYPE_CHECKING:
    from flame.checkpoint.reference import ModelReference

_OF_RANK = re.compile(r"__(\d{1,9})_\d+\.distcp")


def verify_together(step: Path) -> None:
    """Compare every file of a step with its hash, once in a job. Collective.

    Afterwards the readers of this job read the step without comparing its files again.

    Raises:
        UserError: on every rank, naming a file that one of them found damaged.
    """
    peers = Peers()
    hashes = peers.agree(lambda: read_checksums(step))
    found = peers.agree(lambda: (identity(step), is_compared(step)))
    everywhere: list[tuple[Identity, bool]] = gather_objects(found)
    if all(compared for _, compared in everywhere):
        return
    sharing = [other for other, (seen, _) in enumerate(everywhere) if seen == found[0]]
    names = dealt(list(hashes), sharing.index(rank()), len(sharing))
    peers.go_through(_checked(step, names, hashes))
    note_compared(step)


def verify_model(reference: "ModelReference") -> None:
    """Verify the step of a model, and those of the models that its adapters need. Collective.

    Models without recorded hashes pass.

    Raises:
        UserError: as `verify_together`, or the base of adapters is missing.
    """
    if reference.step_folder is not None and not reference.unverified:
        verify_together(reference.step_folder)
    if reference.is_lora:
        verify_model(Peers().agree(reference.base))


def dealt(names: Sequence[str], place: int, sharers: int) -> list[str]:
    """Return the files of a step that number `place` of `sharers` ranks hashes.

    The files that ranks wrote are shared in their order, so that neighbours are neighbouring rows;
    the others go to the last ranks.
    """
    written = {int(found[1]): name for name in names if (found := _OF_RANK.fullmatch(name))}
    every = [written.get(number, "") for number in range(max(written, default=-1) + 1)]
    others = sorted(set(names) - set(written.values()))
    return [name for name in share(every, place, sharers) if name] + others[
        sharers - 1 - place :: sharers
    ]


def _checked(step: Path, names: Sequence[str], hashes: dict[str, str]) -> Iterator[int]:
    if METADATA not in hashes:
        raise UserError(f"{step / CHECKSUMS} does not list {METADATA}: use another step")
    for name in names:
        yield from checked_parts(step, name, hashes)
