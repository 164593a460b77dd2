"""The kernel of Gram matrices, interpreted, against sums in float64."""

import re
import subprocess
from pathlib import Path
from unittest import mock

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.gram import gram_matrices, takes
from kernels.gram.kernel import gram_kernel
from pruning.calibration.products import products_for
from pruning.linalg import strong_rrqr
from pruning.statistics.products import add_products_in_pieces_, error_bound

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def rows(
    batch: int, tokens: int, heads: int, width: int, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """Fresh rows of a graded spectrum, of one sign in half of their channels."""
    generator = torch.Generator().manual_seed(tokens * width)
    x = torch.randn(batch, tokens, heads, width, generator=generator)
    x[..., ::2] = x[..., ::2].abs()
    return (x * torch.logspace(0, -2, width)).to(dtype)


def exactly(*given: Tensor) -> Tensor:
    wide = [x.double().flatten(0, 1) for x in given]
    return sum(torch.einsum("nhi,nhj->hij", x, x) for x in wide)  # type: ignore[return-value]


def poisoned(*size: int, **options) -> Tensor:
    return torch.full(size, torch.nan, **options)


def check(*given: Tensor) -> None:
    assert takes(*given)
    with mock.patch.object(torch, "empty", poisoned):
        found = gram_matrices(*given)
    expected = exactly(*given)
    lengths = expected.diagonal(dim1=-2, dim2=-1).sqrt()
    error = (found - expected).abs() / (lengths[:, :, None] * lengths[:, None]).clamp_min(1e-300)
    assert error.max() <= error_bound(given[0].dtype)
    assert error.max() <= 1e-6
    assert torch.equal(found, found.mT)


@pytest.mark.interpreter
@pytest.mark.parametrize("width", [16, 24, 80, 136, 256])
def test_every_width(width: int) -> None:
    check(rows(1, 70, 2, width), rows(1, 130, 2, width))


@pytest.mark.interpreter
@pytest.mark.parametrize("tokens", [0, 1, 64, 65])
def test_lengths_around_a_piece(tokens: int) -> None:
    check(rows(2, tokens, 3, 32), rows(1, 64, 3, 32))
    check(rows(2, tokens, 3, 32))


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_many_pieces_and_several_keys_a_token(dtype: torch.dtype) -> None:
    check(rows(1, 300, 2, 48, dtype), rows(1, 900, 2, 48, dtype))


@pytest.mark.interpreter
def test_rows_that_lie_apart() -> None:
    fused = rows(2, 100, 4, 96)
    check(fused[..., :32], fused[:, ::2, :, 32:64])
    check(rows(1, 70, 32, 3).movedim(2, 3))


@pytest.mark.interpreter
def test_pieces_add_up_as_in_float64() -> None:
    """One number and then many that float32 would lose beside it."""
    x = torch.zeros(1, 64 * 60, 1, 16, dtype=torch.bfloat16)
    x[0, 0] = 4096.0
    x[0, 64::64] = 0.5
    assert torch.equal(gram_matrices(x), exactly(x))


@pytest.mark.interpreter
def test_a_calibration_in_pieces_takes_the_kernel_and_keeps_the_same_channels() -> None:
    x = rows(1, 700, 2, 64)
    add_ = products_for(x.device, "pieces")
    gram, plain = (torch.zeros(2, 64, 64, dtype=torch.float64) for _ in range(2))
    with mock.patch("kernels.gram.gram_matrices", wraps=gram_matrices) as kernel:
        add_(gram, x, x)
        assert kernel.call_count == 1
        with mock.patch.dict("os.environ", SLIMSTATE_KERNELS="fla"):
            add_(plain, x, x)
        add_(torch.zeros_like(gram), x.float())
        assert kernel.call_count == 1
    add_products_in_pieces_(plain.neg_(), x, x)
    assert torch.equal(plain, torch.zeros_like(plain))
    for k in (16, 32, 48):
        assert torch.equal(strong_rrqr(gram, k), strong_rrqr(exactly(x, x), k))
    assert not takes(x[..., :12]) and not takes(x, x, x) and not takes(x, x[..., :32])


@pytest.mark.parametrize("capability", [89, 90])
def test_it_compiles_for_gpus_and_spills_no_register(capability: int, tmp_path: Path) -> None:
    """The interpreter accepts what the compiler may not."""
    signature, constants = {}, {"ROWS": 64, "TILE": 64, "WIDEN": False}
    for name in gram_kernel.arg_names:
        kinds = {"left": "*bf16", "right": "*bf16", "sums": "*fp32"}
        signature[name] = "constexpr" if name in constants else kinds.get(name, "i32")
    source = ASTSource(gram_kernel, signature, constants)
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    (tmp_path / "kernel.cubin").write_bytes(kernel.asm["cubin"])
    command = [str(CUOBJDUMP), "-res-usage", str(tmp_path / "kernel.cubin")]
    usage = subprocess.run(command, capture_output=True, text=True, check=True)
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout + usage.stderr))
    assert int(found["REG"]) > 0 and found["STACK"] == found["LOCAL"] == "0", found
    assert "mma" in kernel.asm["ptx"]


def test_the_cpu_has_no_kernel() -> None:
    assert not takes(rows(1, 64, 2, 32))
