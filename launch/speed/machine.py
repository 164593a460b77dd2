"""What a benchmark ran on."""

import platform
from pathlib import Path
from typing import Any

import torch


def machine(device: torch.device) -> dict[str, Any]:
    """Return the device, its name, the CPU threads, and what peak memory counts there."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    memory = (
        "what the CUDA allocator handed out"
        if device.type == "cuda"
        else "the bytes of all tensors alive together"
    )
    return {
        "device": device.type,
        "device_name": name,
        "threads": torch.get_num_threads(),
        "peak_memory": memory,
    }


def _cpu_name() -> str:
    """Return the processor's name on Linux, and its architecture elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
