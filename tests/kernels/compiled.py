"""Triton kernels compiled for a GPU that need not be there, and the arithmetic in the result."""

import re
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

HOPPER = GPUTarget("cuda", 90, 32)
INSTRUCTION = re.compile(r"(wgmma\.mma_async|\bmma)\.sync\.aligned\.m(\d+)n(\d+)k(\d+)")


def compiled(
    kernel: Any, constants: dict[str, Any], types: dict[str, str], warps: int = 4, stages: int = 2
) -> Any:
    """Compile `kernel` for an H100: `types` and `constants` (None too) by argument, else bfloat16.

    Pointers are taken to be aligned to 16 bytes, as torch's are.
    """
    while not isinstance(kernel, triton.JITFunction):
        kernel = kernel.fn
    signature, values, aligned = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else types.get(name, "*bf16")
        if name in constants:
            values[(i,)] = constants[name]
        elif signature[name].startswith("*"):
            aligned[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=values, attrs=aligned)
    return triton.compile(source, HOPPER, {"num_warps": warps, "num_stages": stages})


def matrix_flop(ptx: str, warps: int = 4) -> int:
    """Return the FLOP of a program's matrix instructions, each counted once.

    An `mma` is one warp's, a `wgmma` one of four warps together.
    """
    total = 0
    for kind, *sides in INSTRUCTION.findall(ptx):
        m, n, k = map(int, sides)
        total += 2 * m * n * k * (warps if kind == "mma" else warps // 4)
    return total
