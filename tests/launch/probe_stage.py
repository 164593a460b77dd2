"""A stage that does on command what stages do: work, be misused, break, hang."""

import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flame.errors import UserError
from flame.options import argument
from flame.stage import Stage
from launch.processes.launcher import Job
from launch.processes.topology import Topology


@dataclass(frozen=True)
class Options:
    words: tuple[str, ...] = argument("WORD", "what to do, and its arguments")


def check(options: Options, world_size: int) -> None:
    if options.words[0] == "refuse":
        raise UserError(f"refused for {world_size} processes")


def run(options: Options) -> None:
    rank = int(os.environ["RANK"])
    action, *arguments = options.words
    getattr(sys.modules[run.__module__], f"_{action}")(rank, *arguments)


def start(arguments: Sequence[str], topology: Topology | None = None) -> None:
    """Check and run one command line of the probe."""
    job = Job(STAGE, arguments, STAGE.parse(arguments), topology or Topology())
    job.check()
    job.run()


def _environment(rank: int, folder: str) -> None:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
    lines = [f"{name}={os.environ.get(name)}" for name in names]
    Path(folder, f"rank-{rank}").write_text("\n".join([*lines, f"pid={os.getpid()}"]))
    print(f"stdout of rank {rank}")
    print(f"stderr of rank {rank}", file=sys.stderr)


def _meet(rank: int, folder: str) -> None:
    from flame.process.distributed import barrier, process_group

    with process_group():
        barrier()
    Path(folder, f"rank-{rank}").touch()


def _sockets(rank: int, folder: str) -> None:
    """Write where this process and its launcher can be reached while the ranks have met."""
    from flame.process.distributed import barrier, process_group

    with process_group():
        barrier()
        processes = [os.getpid(), *([os.getppid()] if os.environ["WORLD_SIZE"] != "1" else [])]
        places = {place for process in processes for place in _listening(process)}
        barrier()
    Path(folder, f"rank-{rank}").write_text("\n".join(sorted(places)))


def _listening(pid: int) -> list[str]:
    """The addresses of the network sockets that a process has."""
    import ipaddress

    mine = {os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()}
    places = []
    for table in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            local, inode = line.split()[1], line.split()[9]
            if f"socket:[{inode}]" in mine:
                words = bytes.fromhex(local.partition(":")[0])
                address = b"".join(words[i : i + 4][::-1] for i in range(0, len(words), 4))
                places.append(str(ipaddress.ip_address(address)))
    return places


def _misuse(rank: int) -> None:
    raise UserError("every rank sees that the ratio is 2")


def _misuse_of_one(rank: int) -> None:
    """Rank 1 alone finds a damaged file, while rank 0 waits for it in a collective."""
    if rank == 1:
        raise UserError("shard 1 is damaged")
    _wait_in_collective()


def _damage(rank: int) -> None:
    """Rank 1 alone finds a damaged file after the ranks have met."""
    from flame.process.distributed import barrier, process_group

    with process_group():
        barrier()
        if rank == 1:
            raise UserError("shard 1 is damaged")
        barrier()


def _bug_of_one(rank: int) -> None:
    if rank == 1:
        import torch.distributed as dist

        dist.init_process_group("gloo")
        raise ZeroDivisionError("a bug of rank 1")
    _wait_in_collective()


def _bug(rank: int) -> None:
    raise ZeroDivisionError(f"a bug of rank {rank}")


def _killed(rank: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def _stopped(rank: int) -> None:
    """Rank 0 is stopped, as by Ctrl-Z; rank 1 gives up on it."""
    if rank == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(1)
    raise TimeoutError("no answer of rank 0")


def _status(rank: int) -> None:
    if rank == 1:
        print("words of rank 1", file=sys.stderr)
        sys.exit(7)
    time.sleep(60)


def _flaky(rank: int, folder: str) -> None:
    """Break in the first attempt."""
    marker = Path(folder, f"attempt-{rank}")
    if not marker.exists():
        marker.write_text("")
        raise ZeroDivisionError("a bug of the first attempt")


def _hang(rank: int, folder: str) -> None:
    """Wait for a signal, and clean up after it."""
    half_written = Path(folder, f"half-written-{rank}")
    half_written.write_text("")
    Path(folder, f"pid-{rank}").write_text(str(os.getpid()))
    try:
        time.sleep(120)
    finally:
        half_written.unlink()


def _wait_in_collective() -> None:
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    dist.all_reduce(torch.zeros(1))


STAGE = Stage("probe", "Do on command what stages do.", Options, run, check)

if __name__ == "__main__":
    STAGE.main()
