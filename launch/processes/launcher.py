"""Start a stage in this process, or in several under torchrun's elastic agent.

The options are checked here, before a worker starts. The agent runs in this process, so that only
the reason of a failure reaches the terminal: the one line of a `UserError`, or the traceback of the
rank that failed first. `--dry-run` prints the torchrun command that does the same.
"""

import logging
import os
import shlex
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flame.errors import UserError, first_line
from flame.process.ending import ending_by_signals, others_signals
from flame.process.environment import STORE_VARIABLE, environment
from flame.stage import Stage
from launch.processes import failures
from launch.processes.leftovers import job_folder
from launch.processes.topology import Topology, device_count

FRESH_STORES = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""Makes torchrun open no store for the workers before they start. For several nodes that gives each
restart a new one: the old one holds addresses of processes that have ended, and new ones would wait
for them. On one node the workers meet in a file (flame/process/one_node.py)."""

STOP_VARIABLE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
"""Where torchrun looks for the seconds between a signal to its workers and their end by SIGKILL;
they leave earlier (worker.py)."""


@dataclass(frozen=True)
class Job:
    """One command line of a stage, on some processes."""

    stage: Stage
    arguments: Sequence[str]
    options: Any
    """What `stage.parse` made of `arguments`."""

    topology: Topology

    def check(self) -> None:
        """Raise UserError for everything that can be found wrong before the job runs."""
        self.topology.check()
        with environment(self._rank_zero()):
            self.stage.check(self.options, self.topology.world_size)
            self._check_smaller_sizes()
        _check_devices(self.topology.nproc)

    def _check_smaller_sizes(self) -> None:
        for size in self.topology.smaller_sizes():
            if self.stage.check_size is None:
                raise UserError(
                    f"--nnodes MIN:MAX: {self.stage.name} cannot go on with fewer nodes, give one N"
                )
            self.stage.check_size(self.options, size)

    def command_line(self) -> str:
        """Return the torchrun command that runs the same job, quoted for a shell."""
        options = self.topology.torchrun_options()
        return shlex.join(["torchrun", *options, "-m", self.stage.module, *self.arguments])

    def run(self) -> None:
        """Run the stage to its end, here if it is one process, else in workers.

        Raises:
            UserError: the stage raised it in this process, or the nodes did not meet.
            SystemExit: a worker failed, and the reason has been printed; or a signal ended the job.
        """
        if self.topology.world_size == 1 and not self.topology.max_restarts:
            self._run_here()
        else:
            self._run_workers()

    def _run_here(self) -> None:
        with environment(self._rank_zero()), ending_by_signals():
            self.stage.run(self.options)

    def _run_workers(self) -> None:
        with job_folder() as folder:
            reports = str(folder)
            worker = ["-m", "launch.processes.worker", reports, self.stage.module, *self.arguments]
            log = ["--log-dir", f"{reports}/agent"]
            defaults = _worker_defaults(self.topology.nproc) | self._stop_time()
            if self.topology.starts_again or self.topology.is_local:
                defaults |= FRESH_STORES
            if self.topology.is_local:
                defaults[STORE_VARIABLE] = f"{reports}/store"
            with environment(defaults), others_signals(), _no_logs():
                _run_agent([*self.topology.meeting_in(reports), *log, *worker], folder)

    def _stop_time(self) -> dict[str, str]:
        return {STOP_VARIABLE: os.environ.get(STOP_VARIABLE, str(self.stage.stop_seconds))}

    def _rank_zero(self) -> dict[str, str]:
        size, local_size = str(self.topology.world_size), str(self.topology.nproc)
        ranks = {"RANK": "0", "LOCAL_RANK": "0"}
        return ranks | {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": local_size}


def _check_devices(nproc: int) -> None:
    devices = device_count(nproc)
    if nproc > devices:
        raise UserError(
            f"--nproc {nproc} but {devices} CUDA devices: "
            "start at most as many, or set CUDA_VISIBLE_DEVICES= to run on the CPU"
        )


def _worker_defaults(nproc: int) -> dict[str, str]:
    """Return environment variables for the agent and its workers; set ones keep their values."""
    cores = len(os.sched_getaffinity(0))
    defaults = {
        "OMP_NUM_THREADS": str(max(1, cores // nproc)),
        "TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    return {name: os.environ.get(name, value) for name, value in defaults.items()}


@contextmanager
def _no_logs() -> Iterator[None]:
    """Disable logging inside the `with` block: the agent repeats at length what workers say."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def _killed_by_agent(failed: Mapping[int, Any]) -> set[int]:
    """Return the ranks that the agent ended by SIGKILL, after its patience with them."""
    first = min(failure.timestamp for failure in failed.values())
    # Times are whole seconds.
    patience = int(os.environ[STOP_VARIABLE]) - 1
    late = {rank for rank, failure in failed.items() if failure.timestamp - first >= patience}
    return {rank for rank in late if failed[rank].exitcode == -signal.SIGKILL}


def _run_agent(arguments: list[str], reports: Path) -> None:
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    try:
        torchrun.run(torchrun.parse_args(arguments))
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        sys.stderr.write(failures.explain(codes, reports, _killed_by_agent(error.failures)))
        raise SystemExit(failures.status(codes)) from None
    except SignalException as error:
        raise SystemExit(128 + int(error.sigval)) from None
    except RendezvousError as error:
        raise UserError(f"the nodes did not meet: {first_line(error)}") from error
