"""Which calls of fla's chunk kernels ours stand in for."""

import os
from typing import Any

import torch
from fla.utils import (
    IS_NVIDIA_BLACKWELL,
    IS_NVIDIA_HOPPER,
    TRITON_ABOVE_3_4_0,
    TRITON_ABOVE_3_7_1,
)
from torch import Tensor

from kernels.narrow_chunks.pieces import CHUNK, MAX_KEYS, STEP
from kernels.triton_support import runs_on

_MULTIPLIED = {"q", "k", "v", "w", "u", "h", "do", "dv", "dh", "dw", "du"}
FLA_BLOCK = 64
"""Key channels that fla's kernels take at once; of a multiple of it ours would do the same work."""


def refusal(function: str, arguments: dict[str, Any]) -> str | None:
    """Return why a call of fla's `function` is not ours; None if it is.

    `arguments` are those given by name, as fla's delta rules give all of theirs. Ours have chunks
    of 64 tokens, and one dtype for all that is multiplied.
    """
    tensors = {name: x for name, x in arguments.items() if isinstance(x, Tensor)}
    if "k" not in tensors:
        return "the keys are not given by name"
    keys = tensors["k"]
    width = keys.shape[-1]
    if width % STEP or width % FLA_BLOCK == 0 or width > MAX_KEYS:
        return f"{width} key channels: ours have a multiple of {STEP} between those of {FLA_BLOCK}"
    if not runs_on(keys):
        return f"our Triton kernels are off, or do not run on {keys.device}"
    if IS_NVIDIA_BLACKWELL:
        return "fla works around Triton's faults on Blackwell, ours have not met them"
    if arguments.get("chunk_size", CHUNK) != CHUNK:
        return f"chunks of {arguments['chunk_size']} tokens"
    if {tensors[name].dtype for name in tensors.keys() & _MULTIPLIED} != {keys.dtype}:
        return "mixed dtypes"
    if "g_gamma" in tensors or arguments.get("use_graph"):
        return "one decay for all tokens of a head, or buffers of a CUDA graph"
    check = _CHECKS.get(function)
    return check(arguments) if check else None


def _states(arguments: dict[str, Any]) -> str | None:
    asked = os.environ.get("FLA_INTRACARD_CP", "0") != "0"
    if asked and torch.is_inference_mode_enabled() and arguments.get("cu_seqlens") is not None:
        return "fla is asked to split long documents over one card (FLA_INTRACARD_CP)"
    return None


def _own_gradients(arguments: dict[str, Any]) -> str | None:
    return None if arguments.get("A") is None else "scores are given"


def _output_gradients(arguments: dict[str, Any]) -> str | None:
    if arguments.get("w") is None or arguments.get("dv") is None:
        return "no delta rule: W is missing"
    # fla refuses too: Triton compiled its kernel wrongly there, and ours is of the same kind.
    unsafe = IS_NVIDIA_HOPPER and TRITON_ABOVE_3_4_0 and not TRITON_ABOVE_3_7_1
    if unsafe and arguments.get("g") is not None:
        return "Triton 3.4 to 3.7.0 compiles gated gradients wrongly for Hopper"
    return None


def _writes(arguments: dict[str, Any]) -> str | None:
    size = arguments["A"].shape[-1]
    return None if size == CHUNK else f"chunks of {size} tokens"


_CHECKS = {
    "chunk_gated_delta_rule_fwd_h": _states,
    "chunk_bwd_dv_local": _own_gradients,
    "chunk_bwd_dqkwg": _output_gradients,
    "recompute_w_u_fwd": _writes,
    "prepare_wy_repr_bwd": _writes,
}
