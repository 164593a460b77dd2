"""Which tensors our Triton kernels run on, and that Triton's interpreter runs them in the tests."""

import pytest
import torch
import triton
import triton.language as tl
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels.triton_support import INTERPRETED, runs_on
from tests.interpreter import run_interpreted


@triton.jit
def doubled(x, y, BLOCK: tl.constexpr):
    places = tl.arange(0, BLOCK)
    tl.store(y + places, 2 * tl.load(x + places).to(tl.float32))


def test_without_the_interpreter_only_accelerators_are_ours():
    with FakeTensorMode():
        device = torch.empty(1, device="cuda")
    assert not INTERPRETED
    assert runs_on(device, None) and not runs_on(torch.ones(1))
    assert not runs_on() and not runs_on(device, torch.ones(1))


def test_the_switch_leaves_tensors_to_fla(monkeypatch: pytest.MonkeyPatch):
    with FakeTensorMode():
        device = torch.empty(1, device="cuda")
    monkeypatch.setenv("SLIMSTATE_KERNELS", "fla")
    assert not runs_on(device)
    monkeypatch.setenv("SLIMSTATE_KERNELS", "slimstate")
    assert runs_on(device)
    monkeypatch.setenv("SLIMSTATE_KERNELS", "cuda")
    with pytest.raises(ValueError, match="SLIMSTATE_KERNELS=cuda: known are slimstate, fla"):
        runs_on(device)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_interpreter_runs_kernels_on_the_cpu(dtype: torch.dtype):
    x, y = torch.randn(8).to(dtype), torch.full((8,), torch.nan, dtype=dtype)
    assert INTERPRETED and runs_on(x, y)
    doubled[(1,)](x, y, BLOCK=8)
    assert torch.equal(y, 2 * x)


def fails_where_it_is_interpreted():
    assert not INTERPRETED


def test_a_failure_under_the_interpreter_is_one_here():
    with pytest.raises(AssertionError):
        run_interpreted(__name__, fails_where_it_is_interpreted.__name__, {})
