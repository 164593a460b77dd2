"""How many processes run a stage, and where they meet: the options, and what is wrong with them."""

import argparse
import os
import socket
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

from flame.errors import UserError

STORE_SECONDS = 5.0
"""Time that a node which came before has to answer at the rendezvous endpoint."""


@dataclass(frozen=True)
class Topology:
    """How many processes run a stage, and where they meet."""

    nproc: int = 1
    nnodes: int = 1
    min_nodes: int = 0
    """Nodes that the job goes on with when others are lost; 0: all must be there."""
    node_rank: int | None = None
    rdzv_endpoint: str = ""
    rdzv_id: str = "slimstate"
    max_restarts: int = 0

    @property
    def world_size(self) -> int:
        return self.nproc * self.nnodes

    @property
    def starts_again(self) -> bool:
        """Whether nodes that agree on their ranks start again after a loss."""
        return self.nnodes > 1 and self.node_rank is None and self.max_restarts > 0

    def check(self) -> None:
        """Refuse nodes that cannot meet, and a port that is taken."""
        self._check_elastic()
        if self.node_rank is not None and self.node_rank >= self.nnodes:
            raise UserError(
                f"--node-rank {self.node_rank} of --nnodes {self.nnodes}: "
                f"ranks go from 0 to {self.nnodes - 1}"
            )
        if self.rdzv_endpoint:
            self._check_endpoint()
        elif self.nnodes > 1:
            raise UserError(f"--nnodes {self.nnodes} needs --rdzv-endpoint HOST:PORT of one node")

    def smaller_sizes(self) -> list[int]:
        """The numbers of processes that the job may shrink to, when nodes are lost."""
        return [nodes * self.nproc for nodes in range(self.min_nodes or self.nnodes, self.nnodes)]

    def torchrun_options(self) -> list[str]:
        """The options of torchrun that start these processes."""
        return [*self._meeting(), "--nproc-per-node", str(self.nproc), *self._restarts()]

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
            return ["--standalone"]
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


def split_options(arguments: Sequence[str], nproc: int = 1) -> tuple[Topology, bool, list[str]]:
    """The launcher's options in `arguments`, whether it is a dry run, and the stage's own.

    Without `--nproc` there are `nproc` processes, or as many as there are CUDA devices if fewer.
    """
    known, rest = _parser().parse_known_args(list(arguments))
    values = vars(known)
    values["min_nodes"], values["nnodes"] = values["nnodes"]
    dry_run = values.pop("dry_run")
    values["nproc"] = values["nproc"] or min(nproc, device_count(nproc))
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
    nodes = "nodes; run the same command on each (MIN:MAX goes on when some are lost)"
    add("--nnodes", type=_node_numbers, default=(0, 1), metavar="N", help=nodes)
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


def _node_numbers(text: str) -> tuple[int, int]:
    """`N` as (0, N), and `MIN:MAX` as both."""
    least, colon, most = text.partition(":")
    if not colon:
        return 0, _at_least(1)(text)
    numbers = _at_least(1)(least), _at_least(1)(most)
    if numbers[0] > numbers[1]:
        raise argparse.ArgumentTypeError(f"{text} is no range MIN:MAX")
    return numbers


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
    """Refuse a port where something else answers than a node that came before this one."""
    answers: list[bool] = []
    # The client's own time limit does not hold while it waits for a first word: a thread waits.
    worker = threading.Thread(target=lambda: answers.append(_is_store(host, port)), daemon=True)
    worker.start()
    worker.join(STORE_SECONDS)
    if not (answers and answers[0]):
        raise UserError(
            f"--rdzv-endpoint {host}:{port} is taken by something that is no torchrun job: "
            "choose a free port"
        )


def _is_store(host: str, port: int) -> bool:
    # Of what is no store torch's sockets complain at length.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    import torch.distributed as dist

    limit = timedelta(seconds=STORE_SECONDS)
    try:
        dist.TCPStore(host, port, is_master=False, timeout=limit, wait_for_workers=False)
    except RuntimeError:
        return False
    return True


def device_count(nproc: int) -> int:
    """CUDA devices of this node; without any, CPU processes take the place of `nproc`."""
    if nproc == 1:
        return 1
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else nproc
