"""Launching the kernel of a decode step: which steps it takes, and how their work is shared out."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
from jaxtyping import Float
from torch import Tensor

from kernels.decode_step.kernel import decode_step_kernel
from kernels.decode_step.step import DecodeStep
from kernels.triton_support import INTERPRETED

MAX_WIDTH = 256
"""The widest head, in key and in value channels."""
MAX_ROWS = 1024
MAX_TAPS = 8
MAX_TILE_VALUES = 32
"""Elements of a tile that a thread holds, twice: the next tile is loaded while one is updated."""
SHAPES = ((32, 4), (64, 8), (64, 4), (32, 8), (16, 4))
"""Value channels a tile, and warps: those that a thread can hold are tried, in this order."""
CROWDS = (264, 2112)
"""Programs at which the tuned shape is chosen anew: 2 and 16 for each SM of an H100."""


def refusal(
    rows: int, heads: int, state: Tensor, windows: Sequence[Tensor], state_v_first: bool
) -> str | None:
    """Return why the kernel does not take such a step, or None if it does.

    It takes 1 to 1,024 rows, 8 to 256 key channels in steps of 8, 1 to 256 value channels, 2 to 8
    taps, float32 and bfloat16 states; the state and the windows must be contiguous.

    Args:
        rows: tokens, one a row.
        heads: key heads.
        state: as in `DecodeStep`, as `state_v_first`.
        windows: of the convolutions of q, k and v.
    """
    memory = (state, *windows)
    if state.ndim != 4 or any(window.ndim != 3 for window in windows):
        return "memory of another rank"
    key_width, value_width = state.shape[2:][::-1] if state_v_first else state.shape[2:]
    taps = {window.shape[2] for window in windows}
    checks = {
        f"{rows} rows": 1 <= rows <= MAX_ROWS,
        f"{key_width} key channels": key_width % 8 == 0 and 8 <= key_width <= MAX_WIDTH,
        f"{value_width} value channels": 1 <= value_width <= MAX_WIDTH,
        f"{state.shape[1]} value heads on {heads}": state.shape[1] % heads == 0,
        f"a {state.dtype} state": state.dtype in (torch.float32, torch.bfloat16),
        f"convolutions of {sorted(taps)} taps": len(taps) == 1 and 2 <= min(taps) <= MAX_TAPS,
        "strided memory": all(each.is_contiguous() for each in memory),
        "memory of another batch": all(len(each) == rows for each in memory),
    }
    return next((reason for reason, ours in checks.items() if not ours), None)


def decode_step(step: DecodeStep, shape: tuple[int, int] | None = None) -> Float[Tensor, "N HV*V"]:
    """Return the normed, gated output; the state and the windows are updated in place.

    One launch, no synchronisation, no shape that depends on data: it can be captured in a CUDA
    graph once its shapes have run.

    Args:
        step: its tensors on one device on which `triton_support.runs_on`.
        shape: value channels a tile (a power of two) and warps; None to tune over `SHAPES`.

    Raises:
        ValueError: the kernel does not take the step (`refusal`).
    """
    windows = [convolution.window for convolution in step.convolutions]
    reason = refusal(len(step.q), step.heads, step.state, windows, step.state_v_first)
    if reason is not None:
        raise ValueError(f"the decode step's kernel does not take {reason}")
    out = torch.empty_like(step.v, memory_format=torch.contiguous_format)
    grid = (len(step.q) * step.heads,)
    if shape is None and INTERPRETED:
        shape = shapes(step.key_width)[0]
    if shape is None:
        _TUNED[grid](**_arguments(step, out))
    else:
        _SHAPED[grid](**_arguments(step, out), BV=shape[0], num_warps=shape[1])
    return out


def pieces(width: int) -> tuple[int, ...]:
    """Return the powers of two that add up to `width`, the largest first."""
    return tuple(1 << bit for bit in reversed(range(width.bit_length())) if width >> bit & 1)


def shapes(key_width: int) -> list[tuple[int, int]]:
    """Return the entries of `SHAPES` of which a thread can hold two tiles; at least one."""
    return [(v, w) for v, w in SHAPES if v * key_width <= MAX_TILE_VALUES * 32 * w]


def _arguments(step: DecodeStep, out: Tensor) -> dict[str, Any]:
    decay, output = step.decay, step.output
    group = step.value_heads // step.heads
    tensors = {
        "q": step.q, "k": step.k, "v": step.v, "beta": step.beta, "gate": output.gate,
        "decay": decay and decay.input, "a_log": decay and decay.a_log,
        "dt_bias": decay and decay.dt_bias, "norm_weight": output.weight,
    }  # fmt: skip
    for name, convolution in zip("qkv", step.convolutions, strict=True):
        tensors[f"{name}_weight"], tensors[f"{name}_bias"] = convolution.weight, convolution.bias
    memory = {f"{name}_window": c.window for name, c in zip("qkv", step.convolutions, strict=True)}
    return {
        **{name: None if x is None else x.contiguous() for name, x in tensors.items()},
        **memory,
        "state": step.state,
        "out": out,
        "real": step.real,
        "real_stride": 0 if step.real is None else step.real.stride(0),
        "scale": step.query_scale,
        "eps": output.eps,
        "lower_bound": decay and decay.lower_bound,
        "H": step.heads,
        "G": group,
        "K": step.key_width,
        "V": step.value_width,
        "W": step.convolutions[0].window.shape[2],
        "PIECES": pieces(step.key_width),
        "STATE_V_FIRST": step.state_v_first,
        "CHANNEL_DECAY": step.channel_decay,
        "ACTIVATE_QK": step.activate_qk,
        "BETA_SCALE": step.beta_scale,
        "GATE": output.activation,
        "CROWD": sum(len(step.q) * step.heads >= crowd for crowd in CROWDS),
    }


def _held(configs: list[Any], arguments: dict[str, Any], **_: Any) -> list[Any]:
    kept = shapes(arguments["K"])
    return [c for c in configs if (c.kwargs["BV"], c.num_warps) in kept]


_SHAPED = triton.heuristics(
    {
        "NV": lambda arguments: triton.cdiv(arguments["V"], arguments["BV"]),
        "NV_POWER": lambda arguments: triton.next_power_of_2(
            triton.cdiv(arguments["V"], arguments["BV"])
        ),
    }
)(decode_step_kernel)

# Tuning runs the kernel many times on the caller's memory, so it is put back after each.
_TUNED = triton.autotune(
    configs=[triton.Config({"BV": v}, num_warps=w) for v, w in SHAPES],
    key=["H", "G", "K", "V", "W", "STATE_V_FIRST", "CROWD"],
    prune_configs_by={"early_config_prune": _held},
    restore_value=["state", "q_window", "k_window", "v_window"],
)(_SHAPED)
