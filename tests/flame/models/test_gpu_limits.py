"""What fla refuses on a GPU; a machine with one is put in place of this one."""

import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from flame.errors import UserError
from flame.models.gpu_limits import check_backward, check_dtype, float32_advice

GATED = {"model_type": "gated_deltanet"}
PLAIN = {"model_type": "delta_net"}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    def set_up(major: int = 9, triton: str = "3.6.0", tilelang: bool = False) -> None:
        find, version = importlib.util.find_spec, importlib.metadata.version
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (major, 0))
        monkeypatch.setattr(
            importlib.metadata,
            "version",
            lambda n: triton if n == "triton" else version(n),
        )
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda name: (object() if tilelang else None) if name == "tilelang" else find(name),
        )

    return set_up


@pytest.mark.parametrize("triton", ["3.4.0", "3.6.0", "3.7.0"])
def test_gated_rules_on_hopper_are_refused_with_the_ways_out(gpu: Any, triton: str) -> None:
    gpu(triton=triton)
    with pytest.raises(UserError, match=f"Triton {triton} computes wrong .* 3.7.1.*or tilelang"):
        check_backward(GATED)
    with pytest.raises(UserError, match="gated_deltaproduct"):
        check_backward({"model_type": "gated_deltaproduct", "use_forget_gate": True})


def test_what_trains_rightly_is_not_refused(gpu: Any) -> None:
    check_backward(GATED)
    for machine in ({"triton": "3.3.1"}, {"triton": "3.7.1"}, {"major": 8}, {"tilelang": True}):
        gpu(**machine)
        check_backward(GATED)
    gpu()
    for config in (PLAIN, {"model_type": "kda"}, {"model_type": "gated_deltaproduct"}):
        check_backward(config)


def test_float32_is_refused_where_kernels_do(gpu: Any) -> None:
    check_dtype(PLAIN, "float32")
    assert float32_advice(PLAIN) == "try --dtype float32"
    gpu()
    for config in (PLAIN, {"model_type": "gated_deltaproduct"}):
        for dtype in ("float32", torch.float32):
            with pytest.raises(UserError, match="take no float32 on a GPU: give bfloat16"):
                check_dtype(config, dtype)
        assert float32_advice(config).startswith("try float32 on the CPU")
    for dtype in ("auto", "bfloat16", torch.bfloat16):
        check_dtype(PLAIN, dtype)
    check_dtype(GATED, "float32")


def test_the_families_are_those_whose_operators_say_so() -> None:
    """fla's sources, read where they are installed."""
    spec = importlib.util.find_spec("fla")
    assert spec is not None and spec.origin is not None
    ops = Path(spec.origin).parent / "ops"
    refusing = {p.parent.name for p in ops.glob("*/chunk.py") if "support float32" in p.read_text()}
    assert refusing >= {"delta_rule", "gated_delta_product"}
    assert refusing.isdisjoint({"gated_delta_rule", "kda"})
    text = (ops / "common" / "chunk_o.py").read_text()
    assert "IS_NVIDIA_HOPPER and TRITON_ABOVE_3_4_0 and not TRITON_ABOVE_3_7_1" in text
