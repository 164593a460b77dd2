"""What fla's kernels refuse on a GPU, found out from a config before they are called.

Read in fla 0.6.0: `ops/common/chunk_o.py` raises in the backward pass of gated rules on Hopper
with Triton 3.4 to 3.7.0, whose gradients are wrong there (fla issue 640), unless tilelang is
installed; the delta rule's and the gated delta product's chunked operators take no float32.
"""

import importlib.metadata
import importlib.util
from collections.abc import Mapping
from typing import Any

import torch
from packaging.version import parse

from flame.errors import UserError

HOPPER = 9
"""Major compute capability of H100, H200 and GH200."""

WRONG_TRITON = ("3.4.0", "3.7.1")
"""The first version whose gradients are wrong, and the first whose are right again."""

NO_FLOAT32 = ("delta_net", "delta_net2", "slim_delta_net", "gated_deltaproduct")
GATED = (
    "gated_deltanet", "slim_gated_deltanet", "qwen3_next", "qwen3_5", "qwen3_5_text",
    "qwen3_5_moe", "qwen3_5_moe_text", "qwen4_exp", "qwen4_exp_text", "olmo_hybrid",
)  # fmt: skip
"""Families whose layers call the gated delta rule; of gated delta products the config says it."""


def check_dtype(config: Mapping[str, Any], dtype: str | torch.dtype, what: str = "--dtype") -> None:
    """Raise UserError if a model of this config cannot compute in `dtype` on this machine.

    Args:
        config: the model's `config.json`.
        dtype: its name or the dtype itself; `auto` is what the machine can do.
        what: the option that gave it.
    """
    if str(dtype).removeprefix("torch.") == "float32" and not takes_float32(config):
        raise UserError(
            f"{what} float32: fla's kernels for {config['model_type']} take no float32 on a GPU: "
            "give bfloat16, or set CUDA_VISIBLE_DEVICES= to run on the CPU"
        )


def takes_float32(config: Mapping[str, Any]) -> bool:
    """Whether a model of this config can compute in float32 on this machine."""
    return not torch.cuda.is_available() or config.get("model_type") not in NO_FLOAT32


def float32_advice(config: Mapping[str, Any]) -> str:
    """What to do when logits are not finite, in words that follow a message."""
    if takes_float32(config):
        return "try --dtype float32"
    return "try float32 on the CPU (CUDA_VISIBLE_DEVICES= --dtype float32)"


def check_backward(config: Mapping[str, Any]) -> None:
    """Raise UserError if fla refuses the backward pass of a model of this config on this GPU."""
    if not _is_gated(config) or not torch.cuda.is_available():
        return
    if torch.cuda.get_device_capability()[0] != HOPPER or importlib.util.find_spec("tilelang"):
        return
    found = importlib.metadata.version("triton")
    first, right = map(parse, WRONG_TRITON)
    if first <= parse(found) < right:
        raise UserError(
            f"Triton {found} computes wrong gradients of {config['model_type']} on a Hopper GPU, "
            "so fla refuses to train it: install torch 2.13 (which brings Triton 3.7.1), or "
            "tilelang beside this one"
        )


def _is_gated(config: Mapping[str, Any]) -> bool:
    family = config.get("model_type")
    if family == "gated_deltaproduct":
        return bool(config.get("use_forget_gate", False))
    return family in GATED
