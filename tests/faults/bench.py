"""What the fault tests share: a warm server, inputs, and what undisturbed jobs leave."""

import hashlib
from collections.abc import Callable
from pathlib import Path

from flame.checkpoint.steps import verify_step
from flame.storage.checksums import read_checksums
from tests.faults.fork_server import ForkServer, Job, Outcome
from tests.faults.kill_points import Moment, Work
from tests.faults.tasks import TASKS, make_inputs, run_task


class Bench:
    """Runs tasks in places below `folder`, on inputs that are made once."""

    def __init__(self, folder: Path) -> None:
        self.server, self.folder = ForkServer(), folder
        self.inputs = folder / "inputs"
        self.inputs.mkdir()
        self._work: dict[str, tuple[Work, ...]] = {}
        self._make(make_inputs)

    def undisturbed(self, task: str) -> tuple[Path, tuple[Work, ...]]:
        """A place where `task` was not disturbed, and what its ranks did; made once."""
        place, make = self.folder / f"undisturbed {task}", TASKS[task].make
        if task not in self._work:
            if make is not None:
                self._make(make)
            outcome = self.run(task, place)
            assert set(outcome.statuses) == {0}, outcome.words
            self._work[task] = tuple(work for work in outcome.work if work is not None)
        return place, self._work[task]

    def run(self, task: str, place: Path, moment: Moment | None = None) -> Outcome:
        """Start `task` in `place`, again if it was there before."""
        prepare = TASKS[task].prepare
        if not place.exists():
            place.mkdir()
            if prepare is not None:
                prepare(self.inputs, place)
        arguments, size = (task, self.inputs, place), TASKS[task].world_size
        return self.server.run(
            Job(run_task, arguments, size, place, moment, self._work.get(task, ()))
        )

    def _make(self, make: Callable[[Path], None]) -> None:
        outcome = self.server.run(Job(make, (self.inputs,), 1, self.folder / "making"))
        assert outcome.statuses == (0,), outcome.words


def digests(folder: Path, home: Path | None = None) -> dict[str, str]:
    """A hash for each file below `folder`, as it would be were `home` elsewhere.

    Left out are TensorBoard's files, one for each start, and the index of a step, which holds a
    random number; its other files are hashed, and their hashes in `checksums.json` checked.
    """
    home = folder if home is None else home
    found: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir():
            found[name] = "folder"
        elif path.name == "checksums.json":
            verify_step(path.parent)
            hashes = {n: h for n, h in read_checksums(path.parent).items() if n != ".metadata"}
            found[name] = str(sorted(hashes.items()))
        elif path.name != ".metadata":
            content = path.read_bytes().replace(str(home).encode(), b"")
            found[name] = hashlib.sha256(content).hexdigest()
    return {name: value for name, value in found.items() if "/tb/" not in f"/{name}"}
