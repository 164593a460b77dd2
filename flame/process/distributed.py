"""The process group, the device and the data-parallel mesh that every stage runs on.

One code path serves one process, several gloo processes on CPUs, and NCCL on GPUs: the machine
decides the device, and FSDP2 wraps the model on a mesh of any size, 1 included.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from flame.errors import OWN_ERROR_SECONDS, UserError, wait_for_rank_zero
from flame.process.environment import environment
from flame.process.one_node import node_store, start_alone, stay_on_this_node

DEFAULT_TIMEOUT = timedelta(minutes=10)

_ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
"""Environment of a process that nothing has started as part of a job."""

RANK_ZERO_WORKS = timedelta(hours=12)
"""Timeout of stages whose other ranks wait while rank 0 reads or writes a model."""


def device_type() -> str:
    """`"cuda"` where there is a CUDA device, else `"cpu"`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def compute_dtype(name: str = "auto") -> torch.dtype:
    """Return the torch dtype called `name`, such as `bfloat16`; the name is not checked.

    `auto` is float32 on a CPU and bfloat16 on CUDA, where fla's kernels take no float32. A name
    that torch does not have raises AttributeError.
    """
    if name == "auto":
        name = "float32" if device_type() == "cpu" else "bfloat16"
    return getattr(torch, name)


def local_device() -> torch.device:
    """This process's device: `cuda:LOCAL_RANK`, or the CPU."""
    if device_type() == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


@contextmanager
def process_group(timeout: timedelta = DEFAULT_TIMEOUT) -> Iterator[None]:
    """Initialise the default process group and destroy it at the end; keep one that is there.

    Reads torchrun's environment (`RANK`, `WORLD_SIZE`, `LOCAL_RANK`, `MASTER_ADDR`, `MASTER_PORT`).
    Without it this process is a job of its own while the block lasts. A single process opens no
    socket, and the processes of one node meet on its loopback interface alone (docs/security.md).

    Raises:
        UserError: the node has fewer CUDA devices than processes.
    """
    if dist.is_initialized():
        yield
        return
    alone = {name: value for name, value in _ALONE.items() if name not in os.environ}
    with environment(alone), _initialised(timeout):
        yield


@contextmanager
def _initialised(timeout: timedelta) -> Iterator[None]:
    if device_type() == "cuda":
        _check_local_devices()
        torch.cuda.set_device(local_device())
    size, node_size = (int(os.environ[name]) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if size == node_size:
        stay_on_this_node()
    if size == 1:
        start_alone()
    else:
        backend = "gloo" if device_type() == "cpu" else "cuda:nccl,cpu:gloo"
        store, number = _store(timeout), int(os.environ["RANK"])
        dist.init_process_group(backend, timeout=timeout, store=store, rank=number, world_size=size)
    try:
        yield
    except UserError as error:
        # Ranks that wait for this one fail when it leaves the group: first it waits for its turn.
        wait_for_rank_zero(error, OWN_ERROR_SECONDS)
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size(group: dist.ProcessGroup | None = None) -> int:
    return dist.get_world_size(group) if dist.is_initialized() else 1


def data_parallel_mesh() -> DeviceMesh:
    """A one-dimensional mesh over all ranks, named `world`."""
    return init_device_mesh(device_type(), (world_size(),), mesh_dim_names=("world",))


def summed(values: torch.Tensor) -> list[float]:
    """Sum `values` over all ranks, in place, and return them as numbers. Collective."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values.tolist()


def gather_objects(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Return the `value` of every rank of `group` (default: all), in rank order. Collective."""
    if world_size(group) == 1:
        return [value]
    gathered: list[Any] = [None] * world_size(group)
    dist.all_gather_object(gathered, value, group=group)
    return gathered


def gather_to_first(value: Any, group: dist.ProcessGroup | None = None) -> list[Any] | None:
    """Return the `value` of every rank of `group` on its first one, None on others. Collective."""
    if world_size(group) == 1:
        return [value]
    gathered: list[Any] | None = [None] * world_size(group) if dist.get_rank(group) == 0 else None
    dist.gather_object(value, gathered, group=group, group_dst=0)
    return gathered


def from_rank_zero(value: Any, group: dist.ProcessGroup | None = None) -> Any:
    """Return the `value` of the first rank of `group` (default: all). Collective."""
    if world_size(group) == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, group=group, group_src=0)
    return values[0]


def barrier() -> None:
    """Wait for all ranks."""
    # Not `dist.barrier`, which waits on a GPU where there is one.
    summed(torch.zeros(1))


def _store(timeout: timedelta) -> dist.Store:
    """Return the store in which the processes meet.

    torchrun keeps its store when it restarts the processes. It still holds the addresses of the
    dead, for which the living would wait, so on one node each start has its own keys. Nodes count
    their starts separately, so for several nodes the launcher asks torchrun for fresh stores.
    """
    store = node_store()
    if store is None:
        store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"start-{start}", store)
    return store


def _check_local_devices() -> None:
    wanted = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if wanted > torch.cuda.device_count():
        raise UserError(
            f"{wanted} processes on this node but {torch.cuda.device_count()} CUDA devices: "
            f"start at most {torch.cuda.device_count()}, or set CUDA_VISIBLE_DEVICES= for the CPU"
        )
