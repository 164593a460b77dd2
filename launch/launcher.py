"""Starting a stage: in this process, or in several under torchrun's elastic agent.

Everything that can be checked is checked here, before a worker starts. The agent runs in this
process, so that of a failure only its reason reaches the terminal: the one line of a `UserError`,
or the traceback of the rank that failed first. `--dry-run` prints the torchrun command that does
the same.
"""

import argparse
import inspect
import logging
import os
import shlex
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, NoReturn

from flame.errors import UserError, first_line
from launch import failures

STOP_SECONDS = 15
"""Time that the agent gives its workers after a signal; they leave earlier (launch/worker.py). A
stage that saves its work first says with a `STOP_SECONDS` of its own how long it may take."""

STOP_VARIABLE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
"""Where torchrun looks for that time, in seconds."""


@dataclass(frozen=True)
class Topology:
    """How many processes run a stage, and where they meet."""

    nproc: int = 1
    nnodes: int = 1
    node_rank: int | None = None
    rdzv_endpoint: str = ""
    rdzv_id: str = "slimstate"
    max_restarts: int = 0

    @property
    def world_size(self) -> int:
        return self.nproc * self.nnodes

    def check(self) -> None:
        """Refuse nodes that cannot meet, and a port that is taken."""
        if self.node_rank is not None and self.node_rank >= self.nnodes:
            raise UserError(
                f"--node-rank {self.node_rank} of --nnodes {self.nnodes}: "
                f"ranks go from 0 to {self.nnodes - 1}"
            )
        if self.rdzv_endpoint:
            self._check_endpoint()
        elif self.nnodes > 1:
            raise UserError(f"--nnodes {self.nnodes} needs --rdzv-endpoint HOST:PORT of one node")

    def torchrun_options(self) -> list[str]:
        """The options of torchrun that start these processes."""
        return [*self._meeting(), "--nproc-per-node", str(self.nproc), *self._restarts()]

    def _meeting(self) -> list[str]:
        if not self.rdzv_endpoint:
            return ["--standalone"]
        place = ["--rdzv-endpoint", self.rdzv_endpoint, "--rdzv-id", self.rdzv_id]
        if self.node_rank is None:
            return ["--nnodes", str(self.nnodes), "--rdzv-backend", "c10d", *place]
        return ["--nnodes", str(self.nnodes), "--node-rank", str(self.node_rank), *place]

    def _restarts(self) -> list[str]:
        return ["--max-restarts", str(self.max_restarts)] if self.max_restarts else []

    def _check_endpoint(self) -> None:
        host, _, port = self.rdzv_endpoint.rpartition(":")
        if not (host and port.isdecimal() and 0 < int(port) < 65536):
            raise UserError(f"--rdzv-endpoint {self.rdzv_endpoint}: write it as HOST:PORT")
        # Of several nodes without ranks, the one that finds the port free becomes the host.
        hosts = self.nnodes == 1 or self.node_rank == 0
        _check_port(host.strip("[]"), int(port), must_be_free=hosts)


@dataclass(frozen=True)
class Job:
    """One command line of a stage, on some processes."""

    stage: ModuleType
    arguments: Sequence[str]
    options: Any
    """What the stage's `parse` made of `arguments`."""

    topology: Topology

    def check(self) -> None:
        """Raise `UserError` for all that can be known to be wrong before the job runs."""
        self.topology.check()
        size = {"world_size": self.topology.world_size}
        takes_size = "world_size" in inspect.signature(self.stage.check).parameters
        with _environment(self._rank_zero()):
            self.stage.check(self.options, **(size if takes_size else {}))
        _check_devices(self.topology.nproc)

    def command_line(self) -> str:
        """The torchrun command that runs the same job, quoted for a shell."""
        options = self.topology.torchrun_options()
        return shlex.join(["torchrun", *options, "-m", self.stage.__name__, *self.arguments])

    def run(self) -> None:
        """Run the stage to its end.

        Raises:
            UserError: from the stage, if it runs in this process.
            SystemExit: a worker failed, and the reason has been printed; or a signal ended the job.
        """
        if self.topology.world_size == 1 and not self.topology.max_restarts:
            self._run_here()
        else:
            self._run_workers()

    def _run_here(self) -> None:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        with _environment(self._rank_zero() | address), _own_signals():
            signal.signal(signal.SIGTERM, _leave)
            self.stage.run(self.options)

    def _run_workers(self) -> None:
        with tempfile.TemporaryDirectory(prefix="slimstate-") as reports:
            worker = ["-m", "launch.worker", reports, self.stage.__name__, *self.arguments]
            log = ["--log-dir", f"{reports}/agent"]
            defaults = _worker_defaults(self.topology.nproc) | self._stop_time()
            with _environment(defaults), _own_signals(), _no_logs():
                _run_agent([*self.topology.torchrun_options(), *log, *worker], Path(reports))

    def _stop_time(self) -> dict[str, str]:
        seconds = getattr(self.stage, "STOP_SECONDS", STOP_SECONDS)
        return {STOP_VARIABLE: os.environ.get(STOP_VARIABLE, str(seconds))}

    def _rank_zero(self) -> dict[str, str]:
        size, local_size = str(self.topology.world_size), str(self.topology.nproc)
        ranks = {"RANK": "0", "LOCAL_RANK": "0"}
        return ranks | {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": local_size}


def start(stage: ModuleType, arguments: Sequence[str], topology: Topology | None = None) -> None:
    """Parse, check and run one command line of `stage`: how one stage starts another.

    Raises as `Job.check` and `Job.run` do.
    """
    job = Job(stage, arguments, stage.parse(list(arguments)), topology or Topology())
    job.check()
    job.run()


def split_options(arguments: Sequence[str], nproc: int = 1) -> tuple[Topology, bool, list[str]]:
    """The launcher's options in `arguments`, whether it is a dry run, and the stage's own.

    Without `--nproc` there are `nproc` processes, or as many as there are CUDA devices if fewer.
    """
    known, rest = _parser().parse_known_args(list(arguments))
    values = vars(known)
    dry_run = values.pop("dry_run")
    values["nproc"] = values["nproc"] or min(nproc, _device_count(nproc))
    return Topology(**values), dry_run, rest


def options_help() -> str:
    """The launcher's part of a command's `--help`."""
    return _parser().format_help().partition("\n\n")[2].rstrip()


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message.removeprefix("argument "))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="slimstate", add_help=False, allow_abbrev=False)
    add = parser.add_argument_group("processes").add_argument
    one, zero, default = _at_least(1), _at_least(0), Topology()
    add("--nproc", type=one, metavar="N", help="processes on this node")
    add("--nnodes", type=one, default=1, metavar="N", help="nodes; run the same command on each")
    add("--node-rank", type=zero, metavar="R", help="this node's rank (default: they agree on it)")
    add("--rdzv-endpoint", default="", metavar="HOST:PORT", help="where the nodes meet: one node")
    add("--rdzv-id", default=default.rdzv_id, metavar="ID", help="the job's name on every node")
    add("--max-restarts", type=zero, default=0, metavar="N", help="restarts after a failure")
    add("--dry-run", action="store_true", help="check, print the torchrun command, and stop")
    return parser


def _at_least(bound: int) -> Any:
    def whole_number(text: str) -> int:
        if not text.isdecimal() or int(text) < bound:
            raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least {bound}")
        return int(text)

    return whole_number


def _check_port(host: str, port: int, must_be_free: bool) -> None:
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise UserError(f"--rdzv-endpoint {host}:{port}: {host} is no known host") from error
    if not must_be_free:
        return
    with socket.socket(family, kind) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            raise UserError(
                f"--rdzv-endpoint {host}:{port} cannot be opened here ({error.strerror}): "
                "choose a free port of this node"
            ) from error


def _check_devices(nproc: int) -> None:
    devices = _device_count(nproc)
    if nproc > devices:
        raise UserError(
            f"--nproc {nproc} but {devices} CUDA devices: "
            "start at most as many, or set CUDA_VISIBLE_DEVICES= to run on the CPU"
        )


def _device_count(nproc: int) -> int:
    """CUDA devices of this node; without any, CPU processes take the place of `nproc`."""
    if nproc == 1:
        return 1
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else nproc


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _worker_defaults(nproc: int) -> dict[str, str]:
    """Environment of the agent and its workers, where the user has set nothing."""
    cores = len(os.sched_getaffinity(0))
    defaults = {
        "OMP_NUM_THREADS": str(max(1, cores // nproc)),
        "TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    return {name: os.environ.get(name, value) for name, value in defaults.items()}


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _own_signals() -> Iterator[None]:
    """Put this process's signal handlers back at the end; the agent installs its own."""
    kinds = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    before = {kind: signal.getsignal(kind) for kind in kinds}
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


@contextmanager
def _no_logs() -> Iterator[None]:
    """Silence the agent's log records: they repeat what the workers say, at length."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    """Exit as a shell reports the signal, after outputs that are half written are removed."""
    raise SystemExit(128 + number)


def _run_agent(arguments: list[str], reports: Path) -> None:
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    try:
        torchrun.run(torchrun.parse_args(arguments))
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        sys.stderr.write(failures.explain(codes, reports))
        raise SystemExit(failures.status(codes)) from None
    except SignalException as error:
        raise SystemExit(128 + int(error.sigval)) from None
    except RendezvousError as error:
        raise UserError(f"the nodes did not meet: {first_line(error)}") from error
