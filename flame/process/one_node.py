"""Jobs that need no network: one process by itself, and the processes of one node.

The stores and sockets of torch.distributed listen on all interfaces, and whoever reaches a store
may write in it. A single process needs neither; processes of one node meet in a file of the
launcher's private folder, and talk on the loopback interface.
"""

import os
import socket
import warnings

import torch
import torch.distributed as dist

from flame.process.environment import STORE_VARIABLE

_INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
_LOOPBACK = ("lo", "lo0")


def stay_on_this_node() -> None:
    """Let gloo and NCCL use the loopback interface, unless the environment names another one."""
    names = [name for _, name in socket.if_nameindex() if name in _LOOPBACK]
    for variable in _INTERFACES if names else ():
        os.environ.setdefault(variable, names[0])


def node_store() -> dist.Store | None:
    """The store in the file that the launcher names; None if it names none."""
    file = os.environ.get(STORE_VARIABLE)
    return dist.FileStore(file, int(os.environ["WORLD_SIZE"])) if file else None


def start_alone() -> None:
    """Initialise the process group of a single process, without a socket if torch can.

    torch's `fake` backend copies inputs to outputs, which for one process is what every collective
    does. Versions whose collectives leave outputs as they are get gloo or NCCL.
    """
    from torch.testing._internal.distributed import fake_pg  # noqa: F401

    dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=1)
    if not _copies():
        dist.destroy_process_group()
        backend = "cuda:nccl,cpu:gloo" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def _copies() -> bool:
    """Whether the collectives that FSDP2 and DCP use give a single process its own values."""
    value = torch.arange(1.0, 3.0)
    gathered, scattered, listed = (torch.zeros(2) for _ in range(3))
    with warnings.catch_warnings():
        # FSDP2 calls them by names that torch 2.13 calls outdated.
        warnings.simplefilter("ignore", FutureWarning)
        dist.all_gather_into_tensor(gathered, value)
        dist.reduce_scatter_tensor(scattered, value.clone())
    dist.all_gather([listed], value)
    received: list[object] = [None]
    dist.all_gather_object(received, "value")
    same = all(torch.equal(found, value) for found in (gathered, scattered, listed))
    return same and received == ["value"]
