"""The serving contract against what engines' own checks said (`benchmarks/engine_checks.py`)."""

import json
from pathlib import Path
from typing import Any

import pytest

from pruning.serving.contract import ENGINES, VLLM_CPU, VLLM_GPU, Kernel, Shapes

FACTS: dict[str, Any] = json.loads(Path(__file__).with_name("engine_checks.json").read_text())


def kernel(name: str, where: str = "") -> Kernel:
    return next(k for k in VLLM_GPU.kernels if k.name == name and k.where.startswith(where))


def test_the_record_is_of_the_contract_s_release() -> None:
    assert VLLM_GPU.release == VLLM_CPU.release == FACTS["release"]


def test_classes_are_those_that_the_engine_registers() -> None:
    known = {name for name, there in FACTS["architectures"].items() if there}
    assert set(VLLM_GPU.classes.values()) == known
    assert set(VLLM_CPU.classes.values()) < known


def test_the_cpu_takes_what_it_took() -> None:
    served, others = VLLM_CPU.kernels
    assert served.takes == others.takes
    assert (served.evidence, others.evidence) == ("run", "check run")
    assert {*served.only, *others.only} == set(VLLM_CPU.classes)
    for pair in FACTS["cpu_widths"]:
        assert served.takes.hold(pair["key"], pair["value"]) == (pair["refusal"] is None), pair
    taken = [int(taps) for taps, refusal in FACTS["cpu_conv_taps"].items() if refusal is None]
    assert list(VLLM_CPU.conv_widths) == taken
    assert list(VLLM_CPU.softmax_widths) == FACTS["cpu_softmax_widths"]


def test_the_gpu_chooses_the_prefill_kernel_that_it_chose() -> None:
    for fact in FACTS["gpu_prefill"]:
        flash = kernel("FlashInfer", fact["card"])
        assert flash.chosen is not None
        chosen = flash.chosen.hold(fact["key"], fact["value"])
        assert chosen == (fact["chosen"] == "flashinfer"), fact


def test_the_gpu_s_fused_decoding_takes_what_it_took() -> None:
    fused = kernel("fused CUDA")
    for pair in FACTS["gpu_fused_decode"]:
        assert fused.takes.hold(pair["key"], pair["value"]) == (pair["refusal"] is None), pair


def test_what_takes_a_shape_is_never_looked_for_in_vain() -> None:
    """A flag asks for each kernel that is not chosen unasked, and one leads away from each that is
    chosen for a shape that it does not take, where another one takes it."""
    pairs = ((64, 128), (128, 64), (64, 64), (256, 256), (96, 192))
    for engine in ENGINES.values():
        for found in engine.kernels:
            wrong = found.chosen is not None and any(
                found.chosen.hold(*pair)
                and not found.takes.hold(*pair)
                and any(other.takes.hold(*pair) for other in engine.kernels)
                for pair in pairs
            )
            if found.chosen is None or wrong:
                assert found.flag.startswith("--"), found


@pytest.mark.parametrize(
    ("shapes", "said", "holds", "misses"),
    [
        (Shapes(), "d_k of any width", [(7, 9)], []),
        (Shapes(most=256), "d_k up to 256", [(256, 1)], [(257, 1)]),
        (Shapes(multiple_of=32), "d_k a multiple of 32", [(96, 5)], [(48, 48)]),
        (Shapes(widths=(64, 128), square=True), "d_k = d_v of 64 or 128", [(64, 64)],
         [(64, 128), (96, 96)]),
        (Shapes(most=128, multiple_of=8, square=True), "d_k = d_v up to 128, a multiple of 8",
         [(72, 72)], [(72, 64), (136, 136), (12, 12)]),
    ],
)  # fmt: skip
def test_shapes(
    shapes: Shapes, said: str, holds: list[tuple[int, int]], misses: list[tuple[int, int]]
) -> None:
    assert str(shapes) == said
    assert all(shapes.hold(*pair) for pair in holds)
    assert not any(shapes.hold(*pair) for pair in misses)
