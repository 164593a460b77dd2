"""The number of processes of a job and the place where they meet: options and checks."""

import os
import socket
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta

from flame import options
from flame.errors import UserError
from flame.options import group, option

LOOPBACK = ("--local-addr", "127.0.0.1")
"""What the processes of one node call it: its name may not resolve, and they would wait for it."""

STORE_SECONDS = 5.0
"""Seconds in which the store of an earlier node must answer at the rendezvous endpoint."""


@dataclass(frozen=True)
class Topology:
    """How many processes run a stage, and where they meet."""

    nproc: int = 1
    nnodes: int = 1
    min_nodes: int = 0
    """Nodes that the job goes on with when others are lost; 0: all must be there."""
    node_rank: int | None = option(
        None, "this node's rank (default: they agree on it)", least=0, metavar="R"
    )
    rdzv_endpoint: str = option("", "where the nodes meet: one node", metavar="HOST:PORT")
    rdzv_id: str = option("slimstate", "the job's name on every node", metavar="ID")
    max_restarts: int = option(0, "restarts after a failure", least=0, metavar="N")

    @property
    def world_size(self) -> int:
        return self.nproc * self.nnodes

    @property
    def starts_again(self) -> bool:
        """Whether nodes that agree on their ranks start again after a loss."""
        return self.nnodes > 1 and self.node_rank is None and self.max_restarts > 0

    def check(self) -> None:
        """Raise UserError for nodes that cannot meet, or a port that is taken."""
        self._check_elastic()
        if self.node_rank is not None and self.node_rank >= self.nnodes:
            raise UserError(
                f"--node-rank {self.node_rank} of --nnodes {self.nnodes}: "
                f"ranks go from 0 to {self.nnodes - 1}"
            )
        if self.rdzv_endpoint:
            self._check_endpoint()
            self._check_own_name()
        elif self.nnodes > 1:
            raise UserError(f"--nnodes {self.nnodes} needs --rdzv-endpoint HOST:PORT of one node")

    def _check_own_name(self) -> None:
        """Raise UserError if the other nodes will be told a name of this one that is unknown."""
        name = socket.getfqdn()
        try:
            socket.getaddrinfo(name, None)
        except socket.gaierror as error:
            raise UserError(
                f"this node's name {name} does not resolve, and the nodes of a job reach each "
                "other by name: add it to /etc/hosts or DNS on every node"
            ) from error

    def smaller_sizes(self) -> list[int]:
        """Return the numbers of processes that the job may shrink to when nodes are lost."""
        return [nodes * self.nproc for nodes in range(self.min_nodes or self.nnodes, self.nnodes)]

    @property
    def is_local(self) -> bool:
        """Whether all processes are on this node, and no place to meet is given."""
        return not self.rdzv_endpoint

    def torchrun_options(self) -> list[str]:
        """Return the options of torchrun that start these processes."""
        return [*self._meeting(), "--nproc-per-node", str(self.nproc), *self._restarts()]

    def meeting_in(self, folder: str) -> list[str]:
        """As `torchrun_options`, but processes of one node meet in a file in `folder`."""
        options = self.torchrun_options()
        if not self.is_local:
            return options
        file = ["--rdzv-backend", "c10d", "--rdzv-conf", "store_type=file"]
        place = ["--rdzv-endpoint", f"{folder}/rendezvous", "--rdzv-id", self.rdzv_id]
        return [*file, *place, *options[1:]]

    def _check_elastic(self) -> None:
        if not self.min_nodes:
            return
        nodes = f"--nnodes {self.min_nodes}:{self.nnodes}"
        if self.node_rank is not None:
            raise UserError(f"{nodes} with --node-rank: nodes that come and go agree on ranks")
        if not self.max_restarts:
            raise UserError(f"{nodes} needs --max-restarts N: to go on is to start again")

    def _meeting(self) -> list[str]:
        nodes = f"{self.min_nodes}:{self.nnodes}" if self.min_nodes else str(self.nnodes)
        if not self.rdzv_endpoint:
            return ["--standalone", *LOOPBACK]
        place = ["--rdzv-endpoint", self.rdzv_endpoint, "--rdzv-id", self.rdzv_id]
        if self.node_rank is None:
            return ["--nnodes", nodes, "--rdzv-backend", "c10d", *place]
        return ["--nnodes", nodes, "--node-rank", str(self.node_rank), *place]

    def _restarts(self) -> list[str]:
        return ["--max-restarts", str(self.max_restarts)] if self.max_restarts else []

    def _check_endpoint(self) -> None:
        host, _, port = self.rdzv_endpoint.rpartition(":")
        if not (host and port.isdecimal() and 0 < int(port) < 65536):
            raise UserError(f"--rdzv-endpoint {self.rdzv_endpoint}: write it as HOST:PORT")
        # Of several nodes without ranks, the one that finds the port free becomes the host.
        hosts = self.nnodes == 1 or self.node_rank == 0
        _check_port(host.strip("[]"), int(port), must_be_free=hosts)
        if not hosts and _is_taken(host.strip("[]"), int(port)):
            _check_store(host.strip("[]"), int(port))


def _node_numbers(text: str) -> tuple[int, int]:
    """Return (0, N) for `N` and (MIN, MAX) for `MIN:MAX`; raise ValueError otherwise."""
    least, colon, most = text.partition(":")
    for number in (least, most) if colon else (text,):
        if not number.isdecimal() or int(number) < 1:
            raise ValueError(f"{number} is not a whole number of at least 1")
    if not colon:
        return 0, int(text)
    if int(least) > int(most):
        raise ValueError(f"{text} is no range MIN:MAX")
    return int(least), int(most)


@dataclass(frozen=True)
class LauncherOptions:
    """The options that the launcher takes with every stage."""

    nproc: int | None = option(None, "processes on this node", least=1, metavar="N")
    nnodes: tuple[int, int] = option(
        (0, 1),
        "nodes; run the same command on each (MIN:MAX goes on when some are lost)",
        metavar="N",
        parse=_node_numbers,
    )
    place: Topology = group(Topology)
    dry_run: bool = option(False, "check, print the torchrun command, and stop")


FLAGS = tuple(entry.flag for entry in options.entries(LauncherOptions))
"""The launcher's options as they are written."""


def split_options(arguments: Sequence[str], nproc: int = 1) -> tuple[Topology, bool, list[str]]:
    """Split a command line into topology, whether it is a dry run, and the stage's own words.

    Without `--nproc` there are `nproc` processes, or as many as there are CUDA devices if fewer.

    Raises:
        UserError: a value cannot be read.
    """
    given, rest = options.parse_known(LauncherOptions, "slimstate", arguments)
    min_nodes, nnodes = given.nnodes
    chosen = given.nproc or min(nproc, device_count(nproc))
    topology = replace(given.place, nproc=chosen, nnodes=nnodes, min_nodes=min_nodes)
    return topology, given.dry_run, rest


def options_help() -> str:
    """Return the launcher's part of a command's `--help`."""
    return options.list_text(LauncherOptions, "processes")


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


def _is_taken(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), STORE_SECONDS).close()
    except OSError:
        return False
    return True


def _check_store(host: str, port: int) -> None:
    """Raise UserError unless a torchrun store answers on the port within STORE_SECONDS.

    Such a store is taken for an earlier node of the job. A port without an answer is an error
    too, so call this for a port that is taken.
    """
    answers: list[bool] = []
    # The client's own timeout does not cover its first read, so a thread waits instead.
    worker = threading.Thread(target=lambda: answers.append(_is_store(host, port)), daemon=True)
    worker.start()
    worker.join(STORE_SECONDS)
    if not (answers and answers[0]):
        raise UserError(
            f"--rdzv-endpoint {host}:{port} is taken by something that is no torchrun job: "
            "choose a free port"
        )


def _is_store(host: str, port: int) -> bool:
    # torch's sockets log at length about what is no store.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    import torch.distributed as dist

    limit = timedelta(seconds=STORE_SECONDS)
    try:
        dist.TCPStore(host, port, is_master=False, timeout=limit, wait_for_workers=False)
    except RuntimeError:
        return False
    return True


def device_count(nproc: int) -> int:
    """Return how many CUDA devices this node has; `nproc` if it has none, 1 if `nproc` is 1."""
    if nproc == 1:
        return 1
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else nproc
