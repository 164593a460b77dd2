"""The chunked and the recurrent delta rule against the token loop, and that against fla's naive."""

import pytest
import torch
from fla.ops.delta_rule.naive import delta_rule_recurrence
from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule
from torch import Tensor

from kernels.delta_rule import chunk_delta_rule, fused_recurrent_delta_rule
from kernels.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule
from tests.kernels import reference

LENGTHS = [1, 63, 64, 65]
KEY_DIMS = [16, 48, 96, 128]
DOCUMENTS = [0, 3, 4, 4, 71, 135, 140]


def assert_equal(found: Tensor, expected: Tensor, what: str, tolerance: float = 1e-11) -> None:
    error = (found - expected).abs().max() / expected.abs().max().clamp_min(1e-300)
    assert error < tolerance, f"{what}: relative error {error:.1e}"


def assert_same(operator, expected, leaves: dict[str, Tensor], tolerance: float = 1e-11) -> None:
    """Compare outputs, final states and every gradient."""
    ours, theirs = operator(), expected()
    for name, a, b in zip(("o", "state"), ours, theirs, strict=True):
        assert_equal(a, b, name, tolerance)
    ours, theirs = reference.gradients(ours, leaves), reference.gradients(theirs, leaves)
    assert ours.keys() == theirs.keys()
    for name, grad in theirs.items():
        assert_equal(ours[name], grad, f"gradient of {name}", tolerance)


def gated(x: dict[str, Tensor], **options):
    return chunk_gated_delta_rule(
        x["q"], x["k"], x["v"], x["g"], x["beta"],
        initial_state=x["h"], output_final_state=True, **options,
    )  # fmt: skip


def plain(x: dict[str, Tensor], **options):
    return chunk_delta_rule(
        x["q"], x["k"], x["v"], x["beta"],
        initial_state=x["h"], output_final_state=True, **options,
    )  # fmt: skip


def expected(x: dict[str, Tensor], with_gate: bool = True):
    g = x["g"] if with_gate else None
    return reference.gated_delta_rule(x["q"], x["k"], x["v"], g, x["beta"], x["h"])


def test_the_reference_is_flas_naive_recurrence():
    x = reference.inputs(33, 16, 24, batch=2)
    o, state = expected(x)
    single = {name: tensor.float() for name, tensor in x.items()}
    q, k, v, g, beta, h = single.values()
    theirs = naive_recurrent_gated_delta_rule(
        q, k, v, beta, g, initial_state=h, output_final_state=True
    )
    assert_equal(theirs[0].double(), o, "o", 1e-5)
    assert_equal(theirs[1].double(), state, "state", 1e-5)
    o, state = expected(x, with_gate=False)
    turned = [tensor.transpose(1, 2) for tensor in (q, k, v, beta)]
    theirs = delta_rule_recurrence(*turned, initial_state=h)
    assert_equal(theirs[0].transpose(1, 2).double(), o, "o", 1e-5)
    assert_equal(theirs[1].double(), state, "state", 1e-5)


@pytest.mark.parametrize("d_k", KEY_DIMS)
@pytest.mark.parametrize("tokens", LENGTHS)
def test_gated_chunks_equal_the_token_loop(tokens: int, d_k: int):
    x = reference.inputs(tokens, d_k, 40, batch=2)
    assert_same(lambda: gated(x), lambda: expected(x), x)


@pytest.mark.parametrize("d_k", KEY_DIMS)
@pytest.mark.parametrize("tokens", LENGTHS)
def test_plain_chunks_equal_the_token_loop(tokens: int, d_k: int):
    x = reference.inputs(tokens, d_k, 24, batch=2)
    del x["g"]
    assert_same(lambda: plain(x), lambda: expected(x | {"g": None}, with_gate=False), x)


@pytest.mark.parametrize("chunk_size", [16, 32, 64])
def test_every_chunk_size_gives_the_same(chunk_size: int):
    x = reference.inputs(130, 16, 8)
    assert_same(lambda: gated(x, chunk_size=chunk_size), lambda: expected(x), x)


@pytest.mark.parametrize("operator", [gated, plain])
def test_packed_documents_equal_each_alone(operator):
    """Empty, one-token and long documents, each with its own initial state."""
    x = reference.inputs(DOCUMENTS[-1], 16, 24, states=len(DOCUMENTS) - 1)
    if operator is plain:
        del x["g"]

    def alone():
        found = []
        for i, (start, end) in enumerate(zip(DOCUMENTS, DOCUMENTS[1:], strict=False)):
            part = {n: t[i : i + 1] if n == "h" else t[:, start:end] for n, t in x.items()}
            if start == end:
                found.append((part["v"], part["h"]))
            else:
                found.append(expected(part | {"g": part.get("g")}, operator is gated))
        return torch.cat([o for o, _ in found], 1), torch.cat([s for _, s in found])

    bounds = torch.tensor(DOCUMENTS)
    assert_same(lambda: operator(x, cu_seqlens=bounds), alone, x)


@pytest.mark.parametrize("decay", [0.01, 30.0, 3000.0])
def test_strong_and_weak_decay(decay: float):
    x = reference.inputs(65, 16, 24, decay=decay)
    assert_same(lambda: gated(x), lambda: expected(x), x)


def test_decay_next_to_strong_decay_keeps_float32_precision():
    """Float32 sums of -1000 a step would lose the -0.01 between two neighbours."""
    x = reference.inputs(64, 16, 24, dtype=torch.float32)
    with torch.no_grad():
        x["g"][:] = -0.01
        x["g"][:, ::16] = -1000.0
    wide = {name: tensor.detach().double() for name, tensor in x.items()}
    for ours, theirs in zip(gated(x), expected(wide), strict=True):
        assert_equal(ours.double(), theirs, "float32", 1e-6)


@pytest.mark.parametrize("operator", [gated, plain])
def test_float32_is_as_exact_as_flas_naive(operator):
    """The error against float64 is at most twice that of fla's float32 token loop."""
    x = reference.inputs(130, 48, 24)
    single = {name: tensor.detach().float() for name, tensor in x.items()}
    o, state = expected(x, operator is gated)
    q, k, v, g, beta, h = single.values()
    g = g if operator is gated else torch.zeros_like(g)
    naive = naive_recurrent_gated_delta_rule(
        q, k, v, beta, g, initial_state=h, output_final_state=True
    )
    for ours, theirs, exact in zip(operator(single), naive, (o, state), strict=True):
        floor = torch.finfo(torch.float32).eps * exact.abs().max()
        allowed = 2 * (theirs - exact).abs().max() + floor
        assert (ours - exact).abs().max() <= allowed


def test_value_heads_share_key_heads():
    x = reference.inputs(70, 16, 24, key_heads=2, heads=6)
    assert_same(lambda: gated(x), lambda: expected(x), x)


@pytest.mark.parametrize("negative", [False, True])
def test_flags_of_the_layer(negative: bool):
    """L2 norm, sigmoid and gate inside, states with the value dimension first, own scale."""
    x = reference.inputs(70, 16, 24)
    x["A_log"] = torch.tensor([0.5, -1.0], dtype=torch.float64, requires_grad=True)
    x["dt_bias"] = torch.tensor([-0.3, 0.2], dtype=torch.float64, requires_grad=True)

    def ours():
        o, state = chunk_gated_delta_rule(
            3 * x["q"], 2 * x["k"], x["v"], x["g"], x["beta"], scale=0.3,
            initial_state=x["h"].mT, output_final_state=True, state_v_first=True,
            use_qk_l2norm_in_kernel=True, use_beta_sigmoid_in_kernel=True,
            allow_neg_eigval=negative, use_gate_in_kernel=True,
            A_log=x["A_log"], dt_bias=x["dt_bias"],
        )  # fmt: skip
        return o, state.mT

    def theirs():
        q, k = (
            t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (3 * x["q"], 2 * x["k"])
        )
        beta = x["beta"].sigmoid() * (2 if negative else 1)
        g = reference.gate(x["g"], x["A_log"], x["dt_bias"])
        return reference.gated_delta_rule(q, k, x["v"], g, beta, x["h"], scale=0.3)

    assert_same(ours, theirs, x)


@pytest.mark.parametrize("v_first", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_one_token_steps_equal_the_sequence(v_first: bool, packed: bool):
    x = {n: t.detach() for n, t in reference.inputs(5, 16, 24, batch=3, heads=4).items()}
    o, final = expected(x)
    state = x["h"].mT.contiguous() if v_first else x["h"]
    for t in range(5):
        token = [x[n][:, t : t + 1] for n in ("q", "k", "v", "g", "beta")]
        token = [part.transpose(0, 1) for part in token] if packed else token
        step, state = fused_recurrent_gated_delta_rule(
            *token[:4], beta=token[4], initial_state=state, output_final_state=True,
            state_v_first=v_first, cu_seqlens=torch.arange(4) if packed else None,
        )  # fmt: skip
        step = step.transpose(0, 1) if packed else step
        assert_equal(step, o[:, t : t + 1], f"token {t}")
    assert_equal(state.mT if v_first else state, final, "state")


def test_recurrent_delta_rule_of_any_length_has_gradients():
    """fla's DeltaNet trains through the recurrent operator on 64 tokens or fewer."""
    for tokens in (1, 40):
        x = reference.inputs(tokens, 16, 24)
        del x["g"]

        def ours(x=x):
            return fused_recurrent_delta_rule(
                x["q"], x["k"], x["v"], x["beta"], initial_state=x["h"], output_final_state=True
            )

        assert_same(ours, lambda x=x: expected(x | {"g": None}, with_gate=False), x)


def test_the_initial_state_is_not_written_to():
    x = {n: t.detach() for n, t in reference.inputs(1, 16, 24).items()}
    before = x["h"].clone()
    fused_recurrent_delta_rule(x["q"], x["k"], x["v"], x["beta"], initial_state=x["h"])
    gated(x)
    assert torch.equal(before, x["h"])


def test_layouts_first_used_in_inference_mode_serve_training_later():
    x = reference.inputs(37, 16, 24, states=3)
    bounds = torch.tensor([0, 5, 6, 37])
    with torch.inference_mode():
        gated({n: t.detach() for n, t in x.items()}, cu_seqlens=bounds)
    found = reference.gradients(gated(x, cu_seqlens=bounds), x)
    assert all(grad.isfinite().all() for grad in found.values())


def test_low_precision_input_is_computed_in_float32():
    x = {n: t.detach().bfloat16() for n, t in reference.inputs(65, 16, 24).items()}
    o, state = gated(x)
    exact, _ = expected({name: tensor.double() for name, tensor in x.items()})
    assert o.dtype == torch.bfloat16 and state is not None and state.dtype == torch.float32
    assert_equal(o.double(), exact, "o", 2**-8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seqlens": [0, 3]}, "must rise from 0 to 8"),
        ({"cu_seqlens": [0, 6, 4, 8]}, "must rise from 0 to 8"),
        ({"cu_seqlens": [0, 3, 8]}, "1 initial states for 2 documents"),
        ({"chunk_size": 48}, "must be one of"),
        ({"allow_neg_eigval": True}, "use_beta_sigmoid_in_kernel"),
        ({"use_gate_in_kernel": True}, "needs A_log"),
        ({"head_first": False}, "head_first is gone"),
    ],
)
def test_wrong_options_say_what_is_wrong(change: dict, message: str):
    x = reference.inputs(8, 16, 24)
    if "cu_seqlens" in change:
        change = change | {"cu_seqlens": torch.tensor(change["cu_seqlens"])}
    with pytest.raises(ValueError, match=message):
        gated(x, **change)
