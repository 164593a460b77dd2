"""Our chunk kernels for narrow keys inside fla's autograd functions, beside fla's own kernels.

Both run under Triton's interpreter, in float16 where a GPU would have bfloat16, which the
interpreter cannot multiply. The error against the token loop in float64 may be twice that of fla's.
"""

import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels.narrow_chunks import pieces, refusal
from tests.kernels import reference

PACKED = (0, 70, 70, 71, 135, 150)


@dataclass(frozen=True)
class Case:
    d_k: int
    dtype: torch.dtype = torch.float16
    d_v: int = 24
    gated: bool = True
    packed: bool = False
    states: bool = True
    v_first: bool = False
    key_heads: int = 1
    batch: int = 1
    decay: float = 1.0

    @property
    def documents(self) -> int:
        return len(PACKED) - 1 if self.packed else self.batch


FAST = [
    Case(80, packed=True, v_first=True),
    Case(96, gated=False, packed=True, key_heads=2, d_v=16),
    Case(48, torch.float32, states=False, batch=2, decay=30.0, d_v=16),
]
WIDE = [
    Case(112, d_v=72),
    Case(112, torch.float32, packed=True, v_first=True, decay=30.0),
    Case(16, torch.float32, d_v=64, batch=2, key_heads=2),
    Case(16, gated=False, key_heads=2, states=False, d_v=64),
    Case(96, d_v=64, decay=0.01, batch=2, v_first=True),
    Case(96, torch.float32, packed=True, states=False),
    Case(240, packed=True, d_v=40),
    Case(208, gated=False, key_heads=2, d_v=40),
]


@pytest.mark.interpreter
@pytest.mark.parametrize("case", FAST, ids=str)
def test_errors_are_at_most_twice_flas(case: Case):
    check(case)


@pytest.mark.slow
@pytest.mark.interpreter
@pytest.mark.parametrize("case", WIDE, ids=str)
def test_errors_of_more_widths_are_at_most_twice_flas(case: Case):
    check(case)


def check(case: Case) -> None:
    """Hold outputs, final states and all gradients of ours to those of fla's kernels."""
    from kernels import fla_triton
    from tests.kernels.fla_interpreted import kernels_of

    fla_triton.install()
    inputs = {name: x.detach() for name, x in narrowed(case).items()}
    found = {}
    for owner in ("slimstate", "fla"):
        leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
        with kernels_of(owner):
            found[owner] = outcome(run(case, leaves), leaves)
    leaves = {name: x.double().requires_grad_() for name, x in inputs.items()}
    exact = outcome(token_loop(case, leaves), leaves)
    assert found["slimstate"].keys() == exact.keys()
    eps = torch.finfo(case.dtype).eps
    for name, expected in exact.items():
        ours, theirs = ((found[o][name] - expected).abs().max() for o in ("slimstate", "fla"))
        size = expected.abs().max()
        assert ours <= 2 * theirs + eps * size, f"{name}: {ours:.1e}, fla's {theirs:.1e}"
        assert ours <= 1e-2 * size, f"{name}: {ours:.1e} of {size:.1e}"


@pytest.mark.interpreter
def test_states_with_a_decay_per_key_channel_equal_flas():
    """The two steps that KDA shares with the other rules, in float32: equal to rounding."""
    from fla.ops.common import chunk_delta_h

    from kernels import fla_triton
    from tests.kernels.fla_interpreted import kernels_of

    fla_triton.install()
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    q, k, w = (normal(1, PACKED[-1], 2, 48) / 7 for _ in range(3))
    u, do, dv = (normal(1, PACKED[-1], 2, 24) for _ in range(3))
    gk, bounds = -normal(1, PACKED[-1], 2, 48).abs(), torch.tensor(PACKED)
    h, dht = (normal(len(PACKED) - 1, 2, 24, 48) for _ in range(2))
    flags = {"gk": gk, "state_v_first": True, "cu_seqlens": bounds}
    found = {}
    for owner in ("slimstate", "fla"):
        with kernels_of(owner):
            forward = chunk_delta_h.chunk_gated_delta_rule_fwd_h(
                k=k, w=w, u=u, initial_state=h, output_final_state=True, **flags
            )
            backward = chunk_delta_h.chunk_gated_delta_rule_bwd_dhu(
                q=q, k=k, w=w, do=do, dv=dv, h0=h, dht=dht, scale=0.3, **flags
            )
        found[owner] = (*forward, *backward)
    for ours, theirs in zip(found["slimstate"], found["fla"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def narrowed(case: Case) -> dict[str, Tensor]:
    """Inputs in the case's dtype, states and log-decays in float32; those that it has."""
    x = reference.inputs(
        PACKED[-1] if case.packed else 130, case.d_k, case.d_v, batch=case.batch, heads=2,
        key_heads=case.key_heads, states=case.documents, decay=case.decay,
    )  # fmt: skip
    absent = {name for name, here in (("g", case.gated), ("h", case.states)) if not here}
    dtypes = {"g": torch.float32, "h": torch.float32}
    return {n: t.to(dtypes.get(n, case.dtype)) for n, t in x.items() if n not in absent}


def run(case: Case, x: dict[str, Tensor]) -> tuple[Tensor, ...]:
    from fla.ops.delta_rule.chunk import ChunkDeltaRuleFunction
    from fla.ops.gated_delta_rule.chunk import ChunkGatedDeltaRuleFunction

    bounds = torch.tensor(PACKED) if case.packed else None
    scale, h = case.d_k**-0.5, x.get("h")
    if not case.gated:
        results = ChunkDeltaRuleFunction.apply(
            x["q"], x["k"], x["v"], x["beta"], scale, h, case.states, False, bounds
        )
    else:
        h = h.mT.contiguous() if case.v_first and h is not None else h
        results = ChunkGatedDeltaRuleFunction.apply(
            x["q"], x["k"], x["v"], x["g"], x["beta"], scale, h, case.states, case.v_first, bounds
        )
    out, final = results
    return (out,) if final is None else (out, final.mT if case.v_first else final)


def token_loop(case: Case, x: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """The recurrence, document by document."""
    bounds = PACKED if case.packed else (0, x["q"].shape[1])
    outs, finals = [], []
    for i, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        part = {name: t[:, start:end] for name, t in x.items() if name != "h"}
        state = x.get("h")
        state = state[i : i + 1] if case.packed and state is not None else state
        if start == end:
            finals.append(state)
            continue
        out, final = reference.gated_delta_rule(
            part["q"], part["k"], part["v"], part.get("g"), part["beta"], state
        )
        outs.append(out)
        finals.append(final)
    out = torch.cat(outs, 1)
    return (out, torch.cat(finals)) if case.states else (out,)


def outcome(outputs: tuple[Tensor, ...], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs and gradients by name, float64."""
    found = dict(zip(("output", "final state"), outputs, strict=False))
    grads = reference.gradients(outputs, leaves)
    found |= {f"gradient of {name}": grad for name, grad in grads.items()}
    return {name: x.detach().double() for name, x in found.items()}


def test_pieces_are_powers_of_two_without_a_gap():
    assert pieces(112) == ((0, 64), (64, 32), (96, 16))
    for width in range(16, 257, 16):
        starts, widths = zip(*pieces(width), strict=True)
        assert sum(widths) == width
        assert list(starts) == [sum(widths[:i]) for i in range(len(widths))]
        assert all(w in (16, 32, 64) for w in widths)
    for wrong in (0, 8, 72, 272):
        with pytest.raises(ValueError, match=f"{wrong} key channels"):
            pieces(wrong)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"width": 64}, "64 key channels"),
        ({"width": 72}, "72 key channels"),
        ({"device": "cpu"}, "do not run on cpu"),
        ({"chunk_size": 32}, "chunks of 32 tokens"),
        ({"dtype": torch.float32}, "mixed dtypes"),
        ({"g_gamma": True}, "one decay for all tokens"),
    ],
)
def test_calls_that_are_not_ours_stay_flas(change: dict, reason: str | None):
    with FakeTensorMode():
        keys = torch.empty(1, 70, 2, change.get("width", 96), device=change.get("device", "cuda"))
        u = torch.empty(1, 70, 2, 128, device=keys.device, dtype=change.get("dtype"))
        keys, u = keys.bfloat16(), u if "dtype" in change else u.bfloat16()
        arguments = {"k": keys, "w": keys, "u": u, "chunk_size": change.get("chunk_size", 64)}
        if "g_gamma" in change:
            arguments["g_gamma"] = keys
        found = refusal("chunk_gated_delta_rule_fwd_h", arguments)
    assert found is None if reason is None else found is not None and reason in found


def test_the_switch_leaves_narrow_keys_to_fla(monkeypatch: pytest.MonkeyPatch):
    with FakeTensorMode():
        keys = torch.empty(1, 70, 2, 96, device="cuda")
    assert refusal("chunk_fwd_o", {"q": keys, "k": keys, "v": keys, "h": keys}) is None
    monkeypatch.setenv("SLIMSTATE_KERNELS", "fla")
    assert "are off" in str(refusal("chunk_fwd_o", {"q": keys, "k": keys, "v": keys, "h": keys}))


@pytest.mark.slow
def test_the_benchmark_rehearses_on_a_cpu():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.prefill"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    first, _, _, *rows = done.stdout.splitlines()
    assert first == "interpreter, no timing" and len(rows) == 4
    assert all(float(error) < 1e-5 for row in rows for error in row.split()[2:])
