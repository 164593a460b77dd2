"""The decode step on CUDA: as exact as fla's kernel, and inside a CUDA graph."""

from typing import Any

import pytest
import torch

from kernels.decode_step import DecodeStep, decode_step, reference_step
from tests.kernels.decode_steps import RULES, cloned, memory, of_fla, random_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def errors(found: list[torch.Tensor], exact: list[torch.Tensor]) -> list[float]:
    pairs = zip(found, exact, strict=True)
    return [float((a.double() - b).norm() / b.norm()) for a, b in pairs]


def step_on_gpu(rule: str, K: int, **options: Any) -> DecodeStep:
    return cloned(random_step(rule, K, 128, **options), device="cuda")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("K", [8, 40, 64, 96, 104, 128, 256])
@pytest.mark.parametrize("rows", [1, 300])
def test_as_exact_as_flas_kernel(rule: str, K: int, rows: int):
    step = step_on_gpu(rule, K, rows=rows, heads=4, dtype=torch.bfloat16)
    theirs, exact = cloned(step), cloned(step, torch.float64)
    target = [reference_step(exact), *memory(exact)]
    ours, by_fla = [decode_step(step), *memory(step)], [of_fla(theirs), *memory(theirs)]
    for a, b in zip(errors(ours, target), errors(by_fla, target), strict=True):
        assert a <= 2 * b + torch.finfo(torch.float32).eps


def test_a_graph_replays_steps_of_one_sequence():
    """What is replayed goes on from the memory that the last replay left."""
    step = step_on_gpu("kda", 96, rows=8, padding=True)
    other, graph = cloned(step), torch.cuda.CUDAGraph()
    decode_step(cloned(step))
    with torch.cuda.graph(graph):
        out = decode_step(step)
    for _ in range(4):
        graph.replay()
        torch.testing.assert_close(out, decode_step(other), rtol=0, atol=0)
    for replayed, run in zip(memory(step), memory(other), strict=True):
        assert torch.equal(replayed, run)
