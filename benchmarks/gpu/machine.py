"""What `benchmarks/gpu.sh` ran on: versions, device, and the rates that floors divide by.

python -m benchmarks.gpu.machine
"""

import importlib.metadata
import platform
import sys

import torch

from flame.errors import UserError
from flame.models.gpu_limits import check_backward, takes_float32
from launch.drawing.table import Column, Table
from launch.speed.timing import timed

PACKAGES = (
    "torch", "triton", "fla-core", "flash-linear-attention", "transformers", "torchtitan", "peft",
    "tilelang",
)  # fmt: skip
FAMILIES = ("delta_net", "gated_deltanet", "gated_deltaproduct", "kda")
ROUNDS = 5


def main() -> None:
    rows = {"Python": sys.version.split()[0], "system": platform.platform()}
    rows |= {name: version(name) for name in PACKAGES}
    if torch.cuda.is_available():
        rows |= device()
    else:
        rows["device"] = "none: no figure of this page is of a GPU"
    columns = (Column("what", align="left"), Column("value", align="left"))
    print(Table(columns, [{"what": k, "value": v} for k, v in rows.items()]).text())


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def device() -> dict[str, str]:
    facts = torch.cuda.get_device_properties(0)
    refused = {family: refusal(family) for family in FAMILIES}
    return {
        "device": facts.name,
        "compute capability": f"{facts.major}.{facts.minor}",
        "memory": f"{facts.total_memory / 2**30:.1f} GiB",
        "CUDA of torch": str(torch.version.cuda),
        "copy": f"{copy_rate() / 1e12:.2f} TB/s, read and written",
        "bf16 products": f"{product_rate(torch.bfloat16) / 1e12:.0f} TFLOP/s",
        "float64 products": f"{product_rate(torch.float64) / 1e12:.1f} TFLOP/s",
        **{f"training of {family}": why or "taken" for family, why in refused.items()},
        "float32 refused for": ", ".join(
            f for f in FAMILIES if not takes_float32({"model_type": f})
        ),
    }


def refusal(family: str) -> str:
    """Why fla's backward pass of a family is refused here; empty if it is not."""
    try:
        check_backward({"model_type": family, "use_forget_gate": True})
    except UserError as error:
        return str(error)
    return ""


def copy_rate() -> float:
    """Bytes a second that a copy of 2 GiB reads and writes."""
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / best(lambda: target.copy_(source))


def product_rate(dtype: torch.dtype, size: int = 8192) -> float:
    """FLOP a second of a square product."""
    a, b = (torch.randn(size, size, device="cuda", dtype=dtype) for _ in range(2))
    return 2 * size**3 / best(lambda: a @ b)


def best(action: object) -> float:
    assert callable(action)
    return min(timed(action, torch.device("cuda")) for _ in range(ROUNDS + 1))


if __name__ == "__main__":
    main()
