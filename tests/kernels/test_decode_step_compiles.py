"""The decode step compiled for NVIDIA GPUs, which needs none: no register spilled, wide loads.

The interpreter accepts what the compiler may not, and says nothing of how a kernel uses a GPU.
"""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.decode_step import DecodeStep
from kernels.decode_step.kernel import decode_step_kernel
from kernels.decode_step.triton_step import _arguments, shapes
from tests.kernels.decode_steps import random_step

TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.bool: "*i1",
    torch.int64: "*i64",
    float: "fp32",
    int: "i32",
}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
BF16 = torch.bfloat16


def compiled(step: DecodeStep, shape: tuple[int, int], capability: int = 90) -> Any:
    """The kernel as a GPU of this compute capability would get it."""
    tiles = triton.cdiv(step.value_width, shape[0])
    arguments = {
        **_arguments(step, torch.empty_like(step.v)),
        "BV": shape[0],
        "NV": tiles,
        "NV_POWER": triton.next_power_of_2(tiles),
    }
    signature, constants, aligned = {}, {}, {}
    for place, name in enumerate(decode_step_kernel.arg_names):
        value = arguments[name]
        if value is None or name.isupper():
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
            aligned[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = TYPES[type(value)]
    source = ASTSource(decode_step_kernel, signature, constants, aligned)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"num_warps": shape[1]})


def check(kernel: Any, folder: Path, state_dtype: torch.dtype) -> None:
    (folder / "kernel.cubin").write_bytes(kernel.asm["cubin"])
    command = [str(CUOBJDUMP), "-res-usage", str(folder / "kernel.cubin")]
    usage = subprocess.run(command, capture_output=True, text=True, check=True)
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout + usage.stderr))
    assert int(found["REG"]) > 0 and found["STACK"] == found["LOCAL"] == "0", found
    width = {torch.float32: "v4.b32", BF16: "b32"}[state_dtype]
    for direction in ("ld", "st"):
        assert re.search(rf"{direction}\.global\S*\.\S*{width}", kernel.asm["ptx"])


def test_three_quarters_of_a_head_for_an_h100(tmp_path: Path):
    step = random_step("gated", 96, 128, dtype=BF16, padding=True)
    check(compiled(step, shapes(96)[0]), tmp_path, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "state_dtype"), [(80, torch.float32), (90, BF16), (90, torch.float32)]
)
@pytest.mark.parametrize("rule", ["delta", "gated", "kda"])
def test_every_tiling(rule: str, state_dtype: torch.dtype, capability: int, tmp_path: Path):
    for K in (32, 80, 96, 128, 256):
        step = random_step(rule, K, 128, dtype=BF16, state_dtype=state_dtype, group=2, bias=True)
        for shape in shapes(K):
            check(compiled(step, shape, capability), tmp_path, state_dtype)
