"""States stored between tokens: against a loop that knows nothing of chunks, and in bytes."""

import math

import pytest
import torch
from torch import Tensor

from kernels.gated_delta_rule.chunk import Options
from kernels.stored_states import DTYPES, StateStorage, stored_delta_rule
from tests.kernels import reference

D_K, D_V = 16, 40
LENGTHS = (1, 37, 12)
BOUNDS = torch.tensor([0, 1, 38, 50])
FORMATS = [
    StateStorage("float32"),
    StateStorage("bfloat16"),
    StateStorage("float16"),
    StateStorage("float8"),
    StateStorage("int8"),
    StateStorage("int8", "tile"),
    StateStorage("int8", residual="int4"),
    StateStorage("int8", residual="float16"),
    StateStorage("float8", "tile", "int4"),
]


def read_back(state: Tensor, storage: StateStorage, error: Tensor) -> tuple[Tensor, Tensor]:
    """One head's state [K, V] as it is read back, and what error feedback keeps of the rest."""
    if storage.dtype == "float32":
        return state, error
    if storage.dtype in ("bfloat16", "float16"):
        return state.to(DTYPES[storage.dtype]).to(state.dtype), error
    state, width = state + error, 1 if storage.scales == "row" else 32
    scales = torch.empty_like(state)
    for first in range(0, D_V, width):
        part = state[:, first : first + width]
        scales[:, first : first + width] = part.abs().max()
    if storage.dtype == "int8":
        scales, worst = scales / 127, 0.5
        codes = (state / scales).round()
        assert codes.abs().max() <= 127
    else:
        scales, worst = scales / 448, 16.0
        codes = (state / scales).to(torch.float8_e4m3fn).to(state.dtype)
    found = codes * scales
    lost = state - found
    if storage.residual == "float16":
        return found, lost.half().to(lost.dtype)
    if storage.residual == "int4":
        step = scales * worst / 7
        return found, (lost / step).round().clamp(-7, 7) * step
    return found, error


def loop(x: dict[str, Tensor], storage: StateStorage) -> tuple[Tensor, Tensor]:
    """One document, token by token and head by head: outputs [T, H, V], final states [H, K, V]."""
    out = torch.zeros_like(x["v"][0])
    heads, final = x["v"].shape[2], []
    for h in range(heads):
        state, error = x["v"].new_zeros(2, D_K, D_V)
        for t in range(x["v"].shape[1]):
            q, k, v, g, beta = (x[name][0, t, h] for name in ("q", "k", "v", "g", "beta"))
            state = state * (g.exp() if g.ndim == 0 else g.exp()[:, None])
            state = state + torch.outer(k, beta * (v - k @ state))
            out[t, h] = q @ state * D_K**-0.5
            state, error = read_back(state, storage, error)
        final.append(state)
    return out, torch.stack(final)


@pytest.mark.parametrize("channel_decay", [False, True])
@pytest.mark.parametrize("storage", FORMATS, ids=str)
def test_packed_documents_against_a_loop(storage: StateStorage, channel_decay: bool) -> None:
    x = reference.inputs(sum(LENGTHS), D_K, D_V, decay=0.1, channel_decay=channel_decay)
    # Float64 on both sides: the two orders of sums then differ by less than a rounding threshold.
    x = {name: each.detach() for name, each in x.items() if name in ("q", "k", "v", "g", "beta")}
    options = Options(None, None, True, False, BOUNDS)
    o, final = stored_delta_rule(**x, options=options, storage=storage)
    assert final is not None
    for i, (start, end) in enumerate(zip(BOUNDS, BOUNDS[1:], strict=False)):
        out, state = loop({name: each[:, start:end] for name, each in x.items()}, storage)
        torch.testing.assert_close(o[0, start:end], out, atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(final[i], state, atol=1e-9, rtol=1e-9)


def test_feedback_keeps_what_small_writes_add_up_to() -> None:
    """Writes of less than half a step of int8 are lost one by one, and none of them by feedback."""
    tokens, rate = 300, 1e-3
    keys, values = torch.zeros(1, tokens, 1, 2), torch.ones(1, tokens, 1, 2)
    keys[..., 0] = 1.0
    # The first token sets the tile's scale by its first value; the second creeps towards 1.
    values[0, 0, 0, 1] = 0.0
    beta = torch.full((1, tokens, 1), rate)
    beta[0, 0] = 1.0
    options, ends = Options(1.0, None, True, False, None), {}
    for residual in (None, "int4", "float16"):
        storage = StateStorage("int8", "tile", residual)  # type: ignore[arg-type]
        _, final = stored_delta_rule(keys, keys, values, beta, None, options, storage)
        assert final is not None
        ends[residual] = float(final[0, 0, 0, 1])
    expected, step = 1 - (1 - rate) ** (tokens - 1), 1 / 127
    assert ends[None] == 0.0
    assert ends["float16"] == pytest.approx(expected, abs=step)
    # Four bits hold a residual to a 28th of a step, and the writes are of 0.09 to 0.13 steps.
    assert ends["int4"] == pytest.approx(expected, rel=0.4)


def test_states_of_zeros_and_one_number_survive() -> None:
    for storage in FORMATS:
        states = torch.zeros(2, 4, 40)
        states[1, 2, 3] = math.pi
        store = storage.store()
        if store is not None:
            store(states)
        assert torch.isfinite(states).all() and int((states != 0).sum()) == 1
        assert float(states[1, 2, 3]) == pytest.approx(math.pi, rel=2**-7)


@pytest.mark.parametrize(
    ("storage", "expected"),
    [
        (StateStorage("float32"), 3 * 5 * 40 * 4),
        (StateStorage("bfloat16"), 3 * 5 * 40 * 2),
        (StateStorage("float8"), 3 * 5 * 40 + 3 * 40 * 4),
        (StateStorage("int8", "tile"), 3 * 5 * 40 + 3 * 2 * 4),
        # Five residuals of four bits take three bytes.
        (StateStorage("int8", residual="int4"), 3 * 5 * 40 + 3 * 40 * 4 + 3 * 3 * 40),
        (StateStorage("float8", residual="float16"), 3 * 5 * 40 * 3 + 3 * 40 * 4),
    ],
    ids=str,
)
def test_bytes_count_numbers_scales_and_residuals(storage: StateStorage, expected: int) -> None:
    assert storage.bytes(heads=3, key_width=5, value_width=40) == expected
