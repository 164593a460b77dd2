"""Kimi Delta Attention against the token loop, and that against fla's naive."""

import pytest
import torch
from fla.ops.kda.gate import naive_kda_gate, naive_kda_lowerbound_gate
from fla.ops.kda.naive import naive_recurrent_kda
from torch import Tensor

from kernels.kda import chunk_kda, fused_kda_gate, fused_recurrent_kda
from tests.kernels import reference
from tests.kernels.test_delta_rules import DOCUMENTS, LENGTHS, assert_equal, assert_same


def inputs(tokens: int, d_k: int = 16, d_v: int = 24, **options) -> dict[str, Tensor]:
    return reference.inputs(tokens, d_k, d_v, channel_decay=True, **options)


def chunks(x: dict[str, Tensor], **options):
    return chunk_kda(
        x["q"], x["k"], x["v"], x["g"], x["beta"],
        initial_state=x["h"], output_final_state=True, **options,
    )  # fmt: skip


def loop(x: dict[str, Tensor], **options):
    return reference.gated_delta_rule(x["q"], x["k"], x["v"], x["g"], x["beta"], x["h"], **options)


def detached(x: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in x.items()}


def test_the_token_loop_is_flas_naive():
    x = inputs(65, heads=4)
    single = {name: tensor.float() for name, tensor in detached(x).items()}
    theirs = naive_recurrent_kda(
        *(single[name] for name in ("q", "k", "v", "g", "beta")),
        initial_state=single["h"], output_final_state=True,
    )  # fmt: skip
    for found, exact, what in zip(theirs, loop(x), ("o", "state"), strict=True):
        assert_equal(found.double(), exact, what, 1e-5)


@pytest.mark.parametrize("d_k", [16, 48, 128])
@pytest.mark.parametrize("tokens", LENGTHS)
def test_chunks_equal_the_token_loop(tokens: int, d_k: int):
    x = inputs(tokens, d_k, 40, batch=2, heads=4)
    assert_same(lambda: chunks(x), lambda: loop(x), x)


@pytest.mark.parametrize("chunk_size", [16, 32, 64])
@pytest.mark.parametrize("decay", [0.01, 30.0, 3000.0])
def test_weak_and_strong_decay_in_every_chunk_size(chunk_size: int, decay: float):
    x = inputs(130, decay=decay)
    assert_same(lambda: chunks(x, chunk_size=chunk_size), lambda: loop(x), x)


def test_float32_keeps_a_weak_decay_beside_a_strong_one():
    """Quotients of exponentials would overflow; float32 sums from the start would lose -0.01."""
    x = inputs(130, dtype=torch.float32)
    with torch.no_grad():
        x["g"][:] = -0.01
        x["g"][:, ::16, :, ::2] = -1000.0
    wide = {name: tensor.detach().double().requires_grad_() for name, tensor in x.items()}
    ours, theirs = chunks(x), loop(wide)
    for found, exact in zip(ours, theirs, strict=True):
        assert_equal(found.double(), exact, "float32", 1e-6)
    exact = reference.gradients(theirs, wide)
    for name, grad in reference.gradients(ours, x).items():
        assert_equal(grad.double(), exact[name], f"gradient of {name}", 2e-6)


def test_float32_is_as_exact_as_flas_naive():
    """The error against float64 is at most twice that of fla's float32 token loop."""
    x = detached(inputs(130, 48))
    single = {name: tensor.float() for name, tensor in x.items()}
    naive = naive_recurrent_kda(
        *(single[name] for name in ("q", "k", "v", "g", "beta")),
        initial_state=single["h"], output_final_state=True,
    )  # fmt: skip
    for ours, theirs, exact in zip(chunks(single), naive, loop(x), strict=True):
        floor = torch.finfo(torch.float32).eps * exact.abs().max()
        assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max() + floor


def test_low_precision_input_is_computed_in_float32():
    x = {name: tensor.bfloat16() for name, tensor in detached(inputs(65)).items()}
    o, state = chunks(x)
    exact, _ = loop({name: tensor.double() for name, tensor in x.items()})
    assert o.dtype == torch.bfloat16 and state is not None and state.dtype == torch.float32
    assert_equal(o.double(), exact, "o", 2**-8)


def test_packed_documents_equal_each_alone():
    """Empty, one-token and long documents, each with its own initial state."""
    x = inputs(DOCUMENTS[-1], states=len(DOCUMENTS) - 1)

    def alone():
        found = []
        for i, (start, end) in enumerate(zip(DOCUMENTS, DOCUMENTS[1:], strict=False)):
            part = {n: t[i : i + 1] if n == "h" else t[:, start:end] for n, t in x.items()}
            found.append((part["v"], part["h"]) if start == end else loop(part))
        return torch.cat([o for o, _ in found], 1), torch.cat([s for _, s in found])

    assert_same(lambda: chunks(x, cu_seqlens=torch.tensor(DOCUMENTS)), alone, x)


@pytest.mark.parametrize("lower_bound", [None, -5.0])
@pytest.mark.parametrize("recurrent", [False, True])
def test_flags_of_the_layer(lower_bound: float | None, recurrent: bool):
    """L2 norm, sigmoid and gate inside, states with the value dimension first, own scale."""
    x = inputs(70, heads=4)
    generator = torch.Generator().manual_seed(1)
    for name, size in (("A_log", 4), ("dt_bias", 4 * 16)):
        leaf = torch.randn(size, generator=generator, dtype=torch.float64)
        x[name] = leaf.requires_grad_()
    flags = {"scale": 0.3, "lower_bound": lower_bound, "allow_neg_eigval": True}
    flags |= {} if recurrent else {"safe_gate": lower_bound is not None}

    def ours():
        operator = fused_recurrent_kda if recurrent else chunk_kda
        o, state = operator(
            3 * x["q"], 2 * x["k"], x["v"], x["g"], x["beta"],
            initial_state=x["h"].mT, output_final_state=True, state_v_first=True,
            use_qk_l2norm_in_kernel=True, use_beta_sigmoid_in_kernel=True,
            use_gate_in_kernel=True, A_log=x["A_log"], dt_bias=x["dt_bias"], **flags,
        )  # fmt: skip
        return o, state.mT

    def theirs():
        q, k = (
            t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (3 * x["q"], 2 * x["k"])
        )
        raw, rate = x["g"] + x["dt_bias"].view(4, 16), x["A_log"].exp()[:, None]
        g = -rate * torch.nn.functional.softplus(raw)
        if lower_bound is not None:
            g = lower_bound * (rate * raw).sigmoid()
        beta = 2 * x["beta"].sigmoid()
        return reference.gated_delta_rule(q, k, x["v"], g, beta, x["h"], scale=0.3)

    assert_same(ours, theirs, x)


@pytest.mark.parametrize("lower_bound", [None, -5.0])
@pytest.mark.parametrize("bias", [False, True])
def test_the_gate_is_flas(lower_bound: float | None, bias: bool):
    generator = torch.Generator().manual_seed(2)
    g, A_log, dt_bias = (torch.randn(*s, generator=generator) for s in ((2, 5, 3, 4), (3,), (12,)))
    given = dt_bias if bias else None
    ours = fused_kda_gate(g, A_log, given, lower_bound)
    if lower_bound is None:
        theirs = naive_kda_gate(g, A_log, given)
    else:
        theirs = naive_kda_lowerbound_gate(g, A_log, given, lower_bound)
        without = naive_kda_lowerbound_gate(g, None, given, lower_bound)
        torch.testing.assert_close(fused_kda_gate(g, None, given, lower_bound), without)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("steps", [1, 2])
def test_decoding_token_by_token(packed: bool, steps: int):
    x = detached(inputs(6, batch=3, heads=4))
    o, final = loop(x)
    state = x["h"].mT.contiguous()
    for t in range(0, 6, steps):
        token = [x[n][:, t : t + steps] for n in ("q", "k", "v", "g", "beta")]
        token = [part.reshape(1, -1, *part.shape[2:]) for part in token] if packed else token
        out, state = fused_recurrent_kda(
            *token, initial_state=state, output_final_state=True, state_v_first=True,
            cu_seqlens=torch.arange(0, 3 * steps + 1, steps) if packed else None,
        )  # fmt: skip
        assert_equal(out.view(3, steps, 4, -1), o[:, t : t + steps], f"token {t}")
    assert_equal(state.mT, final, "state")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cp_context": object()}, "cp_context has no CPU path"),
        ({"use_graph": True}, "use_graph has no CPU path"),
        ({"return_intermediate_states": True}, "return_intermediate_states has no CPU path"),
        ({"chunk_size": 48}, "must be one of"),
        ({"allow_neg_eigval": True}, "use_beta_sigmoid_in_kernel"),
        ({"use_gate_in_kernel": True}, "needs A_log"),
        ({"use_gate_in_kernel": True, "safe_gate": True}, "lower_bound is None"),
        ({"use_gate_in_kernel": True, "safe_gate": True, "lower_bound": -6.0}, "is -6.0"),
        ({"cu_seqlens": torch.tensor([0, 3])}, "must rise from 0 to 8"),
    ],
)
def test_wrong_options_say_what_is_wrong(change: dict, message: str):
    with pytest.raises((ValueError, NotImplementedError), match=message):
        chunks(inputs(8), **change)


def test_a_decay_per_head_is_refused():
    x = reference.inputs(8, 16, 24)
    with pytest.raises(ValueError, match=r"g has shape \(1, 8, 2\)"):
        chunks(x)
    with pytest.raises(NotImplementedError, match="one beta a head"):
        fused_recurrent_kda(x["q"], x["k"], x["v"], x["g"], x["v"])
