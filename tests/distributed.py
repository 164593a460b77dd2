"""Run a function on several gloo processes that stay alive between tests.

Importing torchtitan, fla and peft takes many seconds a process, so the workers are started once
and given a fresh process group for each call.
"""

import atexit
import os
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.multiprocessing as mp

_TIMEOUT = 300.0


def run_distributed(
    fn: Callable[..., Any], world_size: int = 2, *args: Any, **kwargs: Any
) -> list[Any]:
    """Call `fn(*args, **kwargs)` on `world_size` gloo ranks; return their results by rank.

    `fn` must be a module-level function, its arguments and results picklable.
    """
    workers = [_worker(rank) for rank in range(world_size)]
    port = free_port()
    for rank, worker in enumerate(workers):
        worker.send((fn, args, kwargs, rank, world_size, port))
    outcomes = [worker.receive() for worker in workers]
    failures = [text for ok, text in outcomes if not ok]
    if failures:
        _stop_all()
        raise AssertionError("\n".join(failures))
    return [value for _, value in outcomes]


class _Worker:
    def __init__(self) -> None:
        context = mp.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def send(self, job: tuple) -> None:
        self.pipe.send(job)

    def receive(self) -> tuple[bool, Any]:
        if not self.pipe.poll(_TIMEOUT):
            return False, f"a worker did not answer within {_TIMEOUT:.0f} s"
        try:
            return self.pipe.recv()
        except EOFError:
            self.process.join(5)
            return False, f"a worker died with exit code {self.process.exitcode}"


_WORKERS: dict[int, _Worker] = {}


def _worker(rank: int) -> _Worker:
    worker = _WORKERS.get(rank)
    if worker is None or not worker.process.is_alive():
        worker = _WORKERS[rank] = _Worker()
    return worker


def _stop_all() -> None:
    for worker in _WORKERS.values():
        worker.process.kill()
    _WORKERS.clear()


atexit.register(_stop_all)


def _serve(pipe: Any) -> None:
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            fn, args, kwargs, rank, world_size, port = pipe.recv()
        except EOFError:
            return
        pipe.send(_run(fn, args, kwargs, rank, world_size, port))


def _run(
    fn: Callable[..., Any], args: tuple, kwargs: dict, rank: int, world_size: int, port: int
) -> tuple[bool, Any]:
    import torch.distributed as dist

    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    try:
        dist.init_process_group("gloo", timeout=timedelta(seconds=120))
        return True, fn(*args, **kwargs)
    except BaseException:
        return False, f"rank {rank}:\n{traceback.format_exc()}"
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def free_port() -> int:
    """A TCP port of this host that nothing listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
