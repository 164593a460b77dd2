"""Make torchtitan 0.2.2 run without an accelerator.

This module has import side effects: if there is no CUDA device, it imports and patches torchtitan.
torchtitan's modules copy `device_type` and `device_module` when they are imported, so
`import flame.process.titan_cpu` must come before any other import of torchtitan.
"""

import logging
import os
import resource
import warnings
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from flame.process.distributed import device_type


def _import_torchtitan_for_cpu() -> None:
    """Import torchtitan while torch reports the CPU as the available device.

    `torchtitan/__init__` imports the modules that copy the device type, so a later patch is too
    late.
    """
    found = torch._utils._get_available_device_type
    torch._utils._get_available_device_type = lambda: "cpu"
    try:
        from torchtitan.tools import utils
    finally:
        torch._utils._get_available_device_type = found
    assert utils.device_type == "cpu", "torchtitan was imported before flame.process.titan_cpu"


def _patch_memory_monitor() -> None:
    from torchtitan.components import metrics

    metrics.build_device_memory_monitor = ResidentMemoryMonitor


def _patch_peak_flops() -> None:
    """Make model FLOPs utilisation 0: a CPU's peak is unknown, and torchtitan takes an A100's."""
    from torchtitan.tools import utils

    utils.get_peak_flops = lambda device_name: float("inf")


def _patch_timeouts() -> None:
    """Replace torchtitan's `set_pg_timeouts`, whose barrier names CUDA devices to gloo."""
    from torchtitan.distributed import utils

    def set_pg_timeouts(timeout: timedelta, parallel_dims: Any) -> None:
        dist.barrier()
        meshes = parallel_dims.get_all_one_dimensional_meshes().values()
        for group in [*(mesh.get_group() for mesh in meshes), None]:
            # Mesh dimensions of size 1 have a fake group, which takes no timeout.
            if dist.get_backend(group) == "gloo":
                dist.distributed_c10d._set_pg_timeout(timeout, group)

    utils.set_pg_timeouts = set_pg_timeouts


class ResidentMemoryMonitor:
    """torchtitan's device-memory monitor for a CPU: the process's peak resident memory."""

    device_name = "CPU"

    def get_peak_stats(self) -> Any:
        from torchtitan.components.metrics import DeviceMemStats

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        gib, percent = peak / 2**30, 100 * peak / total
        return DeviceMemStats(gib, percent, gib, percent, 0, 0)

    def reset_peak_stats(self) -> None:
        """Do nothing: the operating system's peak of a process cannot be reset."""


def _silence_import_warnings() -> None:
    for name in ("torchao", "torchtitan"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # Sharded random operators are not used: weights are drawn whole and then sharded.
    warnings.filterwarnings("ignore", "DTensor .* may not have complete support")


_silence_import_warnings()
if device_type() == "cpu":
    _import_torchtitan_for_cpu()
    _patch_memory_monitor()
    _patch_peak_flops()
    _patch_timeouts()
