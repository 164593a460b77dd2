"""A process that has imported everything, and forks the jobs of the fault tests.

A job starts in milliseconds instead of the ten seconds that its imports take. Nothing in the
server runs on threads or has a process group, so a fork behaves like a fresh process.
"""

import atexit
import importlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from flame.errors import UserError
from tests.distributed import free_port
from tests.faults.kill_points import Counter, Moment, Work, kill, processor_time

WARM = (
    "datasets",
    "flame.checkpoint.convert",
    "flame.lora.source",
    "flame.checkpoint.save",
    "flame.convert",
    "flame.recovery.lora",
    "flame.register",
    "flame.training.start_checks",
    "flame.train",
    "flame.training.trainer",
    "peft",
    "pruning.apply",
    "pruning.calibrate",
    "pruning.calibration.collect",
    "pruning.plan",
    "pruning.transform.write",
    "scipy.io",
    "tests.flame.jobs",
)

PATIENCE = 20.0
"""Seconds after which the ranks that were left are told to end, as a launcher tells them at once,
and again those after which one that has not is killed."""

LIMIT = 600.0
"""Seconds for a whole job."""

POLL = 0.0005


@dataclass(frozen=True)
class Job:
    """A function to run on some ranks, in a place of its own."""

    function: Callable[..., None]
    arguments: tuple[Any, ...]
    world_size: int
    place: Path
    """All files below are watched; standard output and error of rank N go to `place/log/N`."""
    moment: Moment | None = None
    work: tuple[Work, ...] = ()
    """Of each rank, undisturbed; the moment's fraction is one of it."""


@dataclass(frozen=True)
class Outcome:
    statuses: tuple[int, ...]
    """Exit status of each rank; negative is a signal."""
    work: tuple[Work | None, ...]
    """Of the ranks that came to their end."""
    hung: bool
    """Ranks that were left did not end by themselves, nor when they were told to."""
    words: str
    """What the ranks wrote, in their order."""
    said: str
    """What rank 0 wrote: under a launcher, what a person reads."""


class ForkServer:
    """The warm process as the tests see it."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        atexit.register(self.close)  # Where a fixture that fails does not come to it.

    def run(self, job: Job) -> Outcome:
        self._pipe.send(job)
        return self._pipe.recv()

    def close(self) -> None:
        self._process.kill()
        self._process.join()


def _serve(pipe: Connection) -> None:
    # Locks that libraries make are then not kept by name: the dead could not remove them.
    multiprocessing.set_start_method("fork", force=True)
    _warm_up()
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        pipe.send(_run(job))


def _warm_up() -> None:
    """Import what the tasks import, their late imports too."""
    import torch

    torch.set_num_threads(1)
    for name in WARM:
        importlib.import_module(name)


def _run(job: Job) -> Outcome:
    log = job.place / "log"
    shutil.rmtree(log, ignore_errors=True)
    log.mkdir(parents=True)
    for name in ("tmp", "work"):
        (job.place / name).mkdir(exist_ok=True)
    ranks = _fork(job)
    statuses, hung = _watch(job, ranks)
    numbers = range(job.world_size)
    words = [_read(log / str(rank)) for rank in numbers]
    work = tuple(_read_work(log / f"work-{rank}") for rank in numbers)
    return Outcome(statuses, work, hung, "\n".join(words), words[0])


def _fork(job: Job) -> list[int]:
    """The ranks of the job, in a process group of their own."""
    port, ranks = free_port(), []
    gate, opened = os.pipe()
    for rank in range(job.world_size):
        process = os.fork()
        if process == 0:
            os.close(opened)
            os.read(gate, 1)
            _be(job, rank, port)
        ranks.append(process)
        os.setpgid(process, ranks[0])
    os.close(gate)
    os.close(opened)
    return ranks


def _be(job: Job, rank: int, port: int) -> None:
    """Be a rank of the job; does not return."""
    status = 1
    try:
        log = job.place / "log"
        _redirect_output(log / str(rank))
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "MASTER_PORT": port}
        sizes = {"WORLD_SIZE": job.world_size, "LOCAL_WORLD_SIZE": job.world_size}
        os.environ.update({name: str(value) for name, value in (ranks | sizes).items()})
        os.environ.update(MASTER_ADDR="127.0.0.1")
        tempfile.tempdir = str(job.place / "tmp")
        own = job.moment if job.moment is not None and job.moment.rank == rank else None
        counter = Counter(job.place / "work", own, job.work[rank] if job.work else None)
        counter.start()
        job.function(*job.arguments)
        (log / f"work-{rank}").write_text(json.dumps(asdict(counter.work())))
        status = 0
    except SystemExit as end:
        status = int(end.code or 0)
    except UserError as error:
        print(f"slimstate: error: {error}", file=sys.stderr)
    finally:
        if status and sys.exc_info()[1] is not None:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _redirect_output(file: Path) -> None:
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)


def _watch(job: Job, ranks: list[int]) -> tuple[tuple[int, ...], bool]:
    """Kill at the job's moment, if it is one of time, and wait for all ranks to end."""
    statuses: dict[int, int] = {}
    limit, ends = _time_limit(job), _Ends(ranks, statuses)
    while len(statuses) < len(ranks):
        time.sleep(POLL)
        _reap(ranks, statuses)
        victim = ranks[job.moment.rank] if job.moment is not None else 0
        if victim not in statuses and limit is not None and processor_time(victim) > limit:
            kill(victim, job.moment is not None and job.moment.whole)
            limit = None
        ends.enforce()
    return tuple(statuses[process] for process in ranks), ends.hung


class _Ends:
    """Ends the ranks that are left after one has failed, or when the job takes too long."""

    def __init__(self, ranks: list[int], statuses: dict[int, int]) -> None:
        self.hung = False
        self._ranks, self._statuses = ranks, statuses
        self._next, self._told = time.monotonic() + LIMIT, False
        self._failed = False

    def enforce(self) -> None:
        now = time.monotonic()
        if any(self._statuses.values()) and not self._failed:
            self._failed, self._next = True, now + PATIENCE
        if now < self._next:
            return
        self.hung = self.hung or self._told
        for process in set(self._ranks) - set(self._statuses):
            os.kill(process, signal.SIGKILL if self._told else signal.SIGTERM)
        self._told, self._next = True, now + PATIENCE


def _reap(ranks: list[int], statuses: dict[int, int]) -> None:
    for process in ranks:
        if process not in statuses:
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                statuses[process] = os.waitstatus_to_exitcode(status)


def _time_limit(job: Job) -> float | None:
    if job.moment is None or job.moment.kind != "time":
        return None
    return job.moment.fraction * job.work[job.moment.rank].seconds


def _read_work(file: Path) -> Work | None:
    return Work(**json.loads(file.read_text())) if file.exists() else None


def _read(file: Path) -> str:
    """What a rank wrote; nothing if it was killed before it could."""
    return file.read_text(errors="replace") if file.exists() else ""
