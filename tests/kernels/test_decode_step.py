"""The fused decode step under Triton's interpreter, its reference, and fla's kernels."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule
from fla.ops.kda.naive import naive_recurrent_kda
from torch.nn import functional as F

from kernels.decode_step import decode_step, reference_step, refusal, triton_step
from kernels.decode_step.triton_step import SHAPES, pieces, shapes
from tests.kernels.decode_steps import RULES, cloned, memory, of_fla, random_step

BF16 = torch.bfloat16


def error(found: list[torch.Tensor], exact: list[torch.Tensor]) -> list[float]:
    """The relative error of each tensor in the 2-norm."""
    pairs = zip(found, exact, strict=True)
    return [float((a.double() - b).norm() / (b.norm() + 1e-30)) for a, b in pairs]


def ours(step: Any, shape: tuple[int, int] | None = None) -> list[torch.Tensor]:
    """What our step gives and leaves behind, from an output that was allocated as NaN."""
    with pytest.MonkeyPatch.context() as patch:
        nan = lambda x, **_: torch.full_like(x, torch.nan)  # noqa: E731
        patch.setattr(triton_step.torch, "empty_like", nan)
        return [decode_step(step, shape), *memory(step)]


def exactly(step: Any) -> list[torch.Tensor]:
    step = cloned(step, torch.float64)
    return [reference_step(step), *memory(step)]


def check(step: Any, tolerance: float, shape: tuple[int, int] | None = None) -> None:
    exact = exactly(step)
    assert max(error(ours(step, shape), exact)) <= tolerance


@pytest.mark.parametrize("rule", ["gated", "kda"])
def test_the_reference_is_flas_naive_recurrence(rule: str):
    """The recurrence of three tokens, with a state behind them."""
    step = random_step(rule)
    start = cloned(step)
    inputs: dict[str, list] = {name: [] for name in "qkvgb"}
    raw = []
    for seed in range(3):
        token = random_step(rule, seed=seed + 1)
        step = replace(step, q=token.q, k=token.k, v=token.v, beta=token.beta)
        convolved = [
            torch.cat([c.window[..., 1:], x[..., None]], -1).mul(c.weight).sum(-1)
            for x, c in zip((step.q, step.k, step.v), step.convolutions, strict=True)
        ]
        for name, x in zip("qkv", convolved, strict=True):
            x = F.silu(x).unflatten(1, (2, -1))
            inputs[name].append(x if name == "v" else F.normalize(x, dim=-1))
        decay = step.decay
        g = -decay.a_log.exp()[:, None] * F.softplus(
            (decay.input + decay.dt_bias).unflatten(1, (2, -1))
        )
        inputs["g"].append(g if rule == "kda" else g[..., 0])
        inputs["b"].append(step.beta.sigmoid())
        raw.append(reference_step(step))
    q, k, v, g, beta = (torch.stack(inputs[name], 1) for name in "qkvgb")
    naive = naive_recurrent_kda if rule == "kda" else naive_recurrent_gated_delta_rule
    o, state = naive(
        q=q, k=k, v=v, g=g, beta=beta, output_final_state=True,
        initial_state=start.state.transpose(2, 3),
    )  # fmt: skip
    o = o / (o.square().mean(-1, keepdim=True) + step.output.eps).sqrt() * step.output.weight
    gate = F.silu(step.output.gate)
    for t, found in enumerate(raw):
        torch.testing.assert_close(found, o[:, t].flatten(1) * gate, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(step.state.transpose(2, 3), state, rtol=1e-4, atol=1e-5)


@pytest.mark.interpreter
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("K", "V"), [(8, 8), (40, 24), (104, 40)])
def test_every_rule_at_odd_widths(rule: str, K: int, V: int):
    check(random_step(rule, K, V, seed=K), 2e-6)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "options",
    [
        {"group": 3, "V": 33},
        {"group": 2, "rule": "kda", "gate": "sigmoid"},
        {"taps": 2, "bias": True, "gate": None, "rule": "delta"},
        {"rows": 5, "padding": True, "beta_scale": 2.0},
        {"activate_qk": False, "scale": 0.5},
        {"decay": 1e4, "rule": "kda"},
        {"decay": 1e-6},
    ],
    ids=str,
)
def test_flags_groups_padding_and_strong_decay(options: dict[str, Any]):
    check(random_step(**options), 2e-6)


@pytest.mark.interpreter
def test_padding_leaves_its_memory_as_it_is():
    step = random_step(rows=3, padding=True)
    before = cloned(step)
    out = ours(step)[0]
    assert (out[2] == 0).all() and (out[:2] != 0).all()
    for now, then in zip(memory(step), memory(before), strict=True):
        assert torch.equal(now[2], then[2]) and not torch.equal(now[:2], then[:2])


@pytest.mark.interpreter
@pytest.mark.parametrize("shape", [(16, 4), (64, 8)])
def test_every_tiling_gives_the_same(shape: tuple[int, int]):
    """70 value channels are cut within a tile, of one and of several."""
    step = random_step(K=48, V=70, rows=1, heads=1, group=2)
    first, second = ours(cloned(step), (32, 4)), ours(step, shape)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("rule", RULES)
def test_four_tokens_are_as_exact_as_by_flas_kernel(rule: str, dtype: torch.dtype):
    """To a factor of two, beside float64, from the same inputs; memory is carried over."""
    one: dict[str, Any] = {"rows": 1, "heads": 1, "dtype": dtype}
    step = random_step(rule, 24, 16, **one)
    theirs, exact = cloned(step), cloned(step, torch.float64)
    for seed in range(4):
        token = random_step(rule, 24, 16, seed=seed + 1, **one)
        names = ("q", "k", "v", "beta")
        news = {name: getattr(token, name) for name in names}
        step, theirs = replace(step, **news), replace(theirs, **news)
        exact = replace(exact, **{name: x.double() for name, x in news.items()})
        target = [reference_step(exact), *memory(exact)]
        found, by_fla = ours(step), [of_fla(theirs), *memory(theirs)]
        for a, b in zip(error(found, target), error(by_fla, target), strict=True):
            assert a <= 2 * b + torch.finfo(torch.float32).eps


@pytest.mark.interpreter
def test_a_bfloat16_state_loses_what_storing_it_loses():
    """The state after the step is the exact one to a unit of bfloat16, four tokens on."""
    step = random_step("kda", 40, 24, state_dtype=BF16)
    for seed in range(4):
        step = replace(step, v=random_step("kda", 40, 24, seed=seed).v)
        exact, found = exactly(step), ours(step)
        assert step.state.dtype == BF16
        torch.testing.assert_close(found[0].double(), exact[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[1].double(), exact[1], rtol=2**-7, atol=1e-6)


@pytest.mark.interpreter
@pytest.mark.slow
@pytest.mark.parametrize("K", range(8, 257, 8))
def test_every_width(K: int):
    for rule, V in (("gated", 128), ("kda", 256), ("delta", K)):
        check(random_step(rule, K, V, rows=1, seed=K), 3e-6)


def test_a_width_is_split_into_powers_of_two():
    assert pieces(96) == (64, 32) and pieces(104) == (64, 32, 8) and pieces(256) == (256,)
    assert all(sum(pieces(width)) == width for width in range(8, 257, 8))


def test_the_tilings_that_are_tried_fit_a_threads_registers():
    assert all(1 <= len(shapes(width)) <= len(SHAPES) == 5 for width in range(8, 257, 8))
    assert (64, 4) not in shapes(128) and shapes(64) == list(SHAPES)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"K": 12}, "12 key channels"),
        ({"K": 264}, "264 key channels"),
        ({"V": 257}, "257 value channels"),
        ({"state_dtype": torch.float16}, "a torch.float16 state"),
        ({"taps": 9}, r"convolutions of \[9\] taps"),
        ({"rows": 1025, "K": 8, "V": 1}, "1025 rows"),
    ],
)
def test_other_shapes_are_refused_by_name(options: dict[str, Any], reason: str):
    with pytest.raises(ValueError, match=f"the decode step's kernel does not take {reason}"):
        decode_step(random_step(**options))


def test_strided_memory_is_refused():
    step = random_step()
    windows = [convolution.window for convolution in step.convolutions]
    assert refusal(2, 2, step.state, windows, True) is None
    strided = step.state.transpose(2, 3)
    assert refusal(2, 2, strided, windows, True) == "strided memory"


def test_the_bytes_that_a_step_must_move():
    """16 heads of 96 keys and 128 values, a float32 state: as in kernels/README.md."""
    step = random_step("gated", 96, 128, rows=1, heads=16, dtype=BF16)
    H, K, V, W = 16, 96, 128, 4
    state, windows = 2 * H * K * V * 4, (2 * H * K + H * V) * (2 * W - 1) * 2
    assert step.bytes_moved == state + windows + (2 * H * K + 3 * H * V + 2 * H) * 2
    assert round(step.bytes_moved / 1e6, 2) == 1.66
