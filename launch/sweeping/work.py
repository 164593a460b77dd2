"""One process of a sweep: takes points from the folder's list, prunes, recovers and measures them.

A point is a job of one process: its stages run in this process as they would from the command line,
in a process group of their own, so that the libraries are imported once for all points.
"""

import dataclasses
import gc
import os
import shutil
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flame.errors import UserError, first_line
from flame.process.ending import signal_received
from flame.process.environment import environment
from launch.sweeping.folder import Record, SweepFolder
from launch.sweeping.measuring import Dense, TextInMemory, measured
from launch.sweeping.points import Point
from pruning.options import DataOptions

DENSE, CONTINUED = "dense", "dense-continued"
"""Names of the controls among the points: the model itself, and trained on as a point recovers."""

FAILURES = (UserError, RuntimeError, OSError, ArithmeticError, MemoryError, ValueError)
"""What ends a point and not the sweep: a person's mistake, and what libraries raise when memory or
the disk is full, a computation has no answer, or a kernel does not take a width."""

ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
"""Environment of a job of one process; LOCAL_RANK stays, which says the device."""


@dataclass(frozen=True)
class Recovery:
    """How pruned models are trained on."""

    recipe: Path
    overrides: tuple[str, ...] = ()
    """`--section.key VALUE …` of `slimstate train`."""

    def words(self, start: Path | str, out: Path) -> list[str]:
        """The command line of `slimstate train` from `start` into `out`."""
        places = ["--model.init", str(start), "--job.dump_folder", str(out)]
        return ["--config", str(self.recipe), *self.overrides, *places]


@dataclass(frozen=True)
class Work:
    """What a worker must know to measure any point."""

    folder: SweepFolder
    model: str
    text: TextInMemory
    dense: Dense
    """What predictions are compared with."""

    statistics: Path
    """Those that methods choose by, for methods that need some."""

    dtype: str = "auto"
    recovery: Recovery | None = None
    budget_words: tuple[str, ...] = ()
    """Options of `slimstate prune` for every point; a point's own come after them."""
    data: DataOptions = field(default_factory=DataOptions)
    """What repairs are fitted on."""

    keep: bool = False

    def measure(self, name: str, stages: Sequence[str], points: Mapping[str, Point]) -> None:
        """Measure a point and keep its record, or the reason why it has none.

        Args:
            stages: those that it is measured in; one that its record has is not measured again.
        """
        models = self.folder.models(name)
        shutil.rmtree(models, ignore_errors=True)
        try:
            with _logged(self.folder.log(name)):
                record = self._record(name, stages, points.get(name), models)
            # Before the record: a point that is killed here is measured again, and clears up then.
            self._discard(models)
            self.folder.keep(name, record)
        except FAILURES as error:
            if signal_received():
                raise
            self.folder.fail(name, first_line(error))
        finally:
            self._discard(models)
            gc.collect()

    def _discard(self, models: Path) -> None:
        if not self.keep:
            shutil.rmtree(models, ignore_errors=True)

    def _record(
        self, name: str, stages: Sequence[str], point: Point | None, models: Path
    ) -> Record:
        record: Record = {"name": name, **(self.folder.record(name) or {})}
        clock = Clock(dict(record.get("seconds") or {}))
        if point is None:
            start = self.model
        else:
            start = str(models / "pruned")
            record |= {"words": list(self._pruning_words(point)), **self._pruned(point, start)}
            clock.lap("prune")
        if "before" in stages and "before" not in record:
            record["before"] = self._measured(start, name)
            clock.lap("evaluate")
        if "recovered" in stages and "recovered" not in record:
            assert self.recovery is not None
            if "before" in record:
                # A recovery that is killed leaves what was measured before it.
                self.folder.keep(name, record | {"seconds": clock.laps})
            out = models / "recovered"
            _train(self.recovery.words(start, out))
            clock.lap("recover")
            record["recovered"] = self._measured(str(out), name)
            clock.lap("evaluate recovered")
        return record | {"seconds": clock.laps}

    def pruning(self, point: Point, out: str) -> Any:
        """The options of `slimstate prune` that make a point's model in the folder `out`."""
        from flame.checkpoint.reference import resolve
        from pruning import prune
        from pruning.plan import needed

        words = [self.model, out, *self._pruning_words(point), "--to", "hf"]
        options = prune.STAGE.parse(words)
        if needed(options.method, options.budget, resolve(self.model).config):
            options = dataclasses.replace(options, stats=self.statistics)
        if not options.repairs:
            return options
        seed = self.data.seed if point.seed is None else point.seed
        return dataclasses.replace(options, data=dataclasses.replace(self.data, seed=seed))

    def _pruning_words(self, point: Point) -> tuple[str, ...]:
        return (*self.budget_words, *point.words)

    def _pruned(self, point: Point, out: str) -> Record:
        """Write the pruned model and keep its plan; return the plan's widths and notes."""
        from pruning import prune

        options = self.pruning(point, out)
        prune.check(options, 1)
        prune.run(options)
        plan = self.folder.keep_plan(point.file_name, Path(out))
        return {"widths": _widths(plan["spaces"]), "notes": plan.get("notes") or []}

    def _measured(self, model: str, name: str) -> Record:
        return measured(model, self.text, self.dtype, name, self.dense)


@dataclass
class Clock:
    """Seconds of what was done, by name."""

    laps: dict[str, float] = field(default_factory=dict)
    _last: float = field(default_factory=time.perf_counter)

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = round(now - self._last, 3)
        self._last = now


@contextmanager
def alone() -> Iterator[None]:
    """A process group of this process by itself, on the device that it has in its job."""
    import torch.distributed as dist

    from flame.process.distributed import process_group

    assert not dist.is_initialized()
    with environment(ALONE), process_group():
        yield


def _widths(spaces: Mapping[str, Sequence[Sequence[int]]]) -> dict[str, list[int]]:
    """By kind of space, the fewest and the most channels that a head keeps."""
    found: dict[str, list[int]] = {}
    for name, kept in spaces.items():
        kind, rows = name.rpartition(".")[2], [len(row) for row in kept]
        low, high = found.get(kind, rows[:1] * 2)
        found[kind] = [min(low, *rows), max(high, *rows)]
    return found


def _train(words: Sequence[str]) -> None:
    from flame import train

    train.run(train.STAGE.parse(words))


@contextmanager
def _logged(path: Path) -> Iterator[None]:
    """Send what this process writes on stdout and stderr to the file `path`, and a traceback."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        yield
    except FAILURES:
        os.write(log, traceback.format_exc().encode())
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, copy in zip((1, 2), saved, strict=True):
            os.dup2(copy, descriptor)
            os.close(copy)
        with suppress(OSError):
            os.close(log)
