"""Moments to kill a process at, and the way there.

A moment is a fraction of what an undisturbed process does: of its operations on files, of its
collectives, or of its processor time, which does not depend on how busy the machine is.
"""

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, Literal

Kind = Literal["files", "collectives", "time"]
COLLECTIVES = (
    "all_gather",
    "all_gather_into_tensor",
    "all_reduce",
    "broadcast",
    "gather",
    "reduce_scatter_tensor",
    "scatter",
)
_WATCHED = ("open", "os.mkdir", "os.rename")
_DELETIONS = ("os.remove", "os.rmdir")
"""They may name their file relative to an open folder, so all count."""


@dataclass(frozen=True)
class Moment:
    kind: Kind
    fraction: float
    """Of the undisturbed process's work, in [0, 1)."""
    rank: int
    """Whose work is counted."""
    whole: bool
    """Kill all processes of the job, or this rank alone."""


@dataclass(frozen=True)
class Work:
    """What an undisturbed process does."""

    files: int
    collectives: int
    seconds: float
    """Of processor time."""


def draw(generator: random.Random, world_size: int) -> Moment:
    """A random moment of a job."""
    kinds: tuple[Kind, ...] = ("files", "time") if world_size == 1 else Kind.__args__
    return Moment(
        kind=generator.choice(kinds),
        fraction=generator.random(),
        rank=generator.randrange(world_size),
        whole=world_size == 1 or generator.random() < 0.5,
    )


class Counter:
    """Counts this process's operations on files below `folder`, and its collectives.

    With `moment` it kills before the operation that `moment` asks for, of those that `work` has.
    """

    def __init__(self, folder: Path, moment: Moment | None, work: Work | None) -> None:
        self.counts = {"files": 0, "collectives": 0}
        self._folder, self._moment, self._last = str(folder), moment, -1
        if moment is not None and work is not None and moment.kind != "time":
            self._last = int(moment.fraction * getattr(work, moment.kind))

    def start(self) -> None:
        """Count from here on, to the end of the process: an audit hook stays."""
        import torch.distributed as dist

        for name in COLLECTIVES:
            counted = self._counted(getattr(dist, name))
            setattr(dist, name, counted)
            setattr(dist.distributed_c10d, name, counted)
        sys.addaudithook(self._on_event)

    def work(self) -> Work:
        return Work(**self.counts, seconds=time.process_time())

    def _on_event(self, event: str, values: tuple[Any, ...]) -> None:
        below = event in _WATCHED and self._folder in str(values[0])
        if below or event in _DELETIONS:
            self._count("files")

    def _counted(self, collective: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(collective)
        def count(*args: Any, **kwargs: Any) -> Any:
            self._count("collectives")
            return collective(*args, **kwargs)

        return count

    def _count(self, kind: str) -> None:
        if self._moment is not None and self._moment.kind == kind:
            if self.counts[kind] == self._last:
                kill(os.getpid(), self._moment.whole)
        self.counts[kind] += 1


def kill(process: int, whole: bool) -> None:
    """SIGKILL to one process, or to all of its group."""
    if whole:
        os.killpg(os.getpgid(process), signal.SIGKILL)
    else:
        os.kill(process, signal.SIGKILL)


def processor_time(process: int) -> float:
    """Seconds that another process has used (Linux's numbering of the clocks of processes)."""
    return time.clock_gettime((~process << 3) | 2)
