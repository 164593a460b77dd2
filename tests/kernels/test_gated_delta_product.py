"""Gated DeltaProduct against the token loop, and that against fla's naive."""

import pytest
import torch
from fla.ops.gated_delta_product.naive import naive_recurrent_gated_delta_product
from torch import Tensor

from kernels.gated_delta_product import chunk_gated_delta_product
from kernels.gated_delta_rule import fused_recurrent_gated_delta_rule
from tests.kernels import reference
from tests.kernels.test_delta_rules import DOCUMENTS, LENGTHS, assert_equal, assert_same


def inputs(tokens: int, steps: int, d_k: int = 16, d_v: int = 24, **options) -> dict[str, Tensor]:
    """q and g of `tokens`, k, v and beta of `steps` times as many."""
    x = reference.inputs(tokens * steps, d_k, d_v, **options)
    for name in ("q", "g"):
        x[name] = x[name].detach()[:, :tokens].requires_grad_()
    return x


def product(x: dict[str, Tensor], steps: int, **options):
    return chunk_gated_delta_product(
        x["q"], x["k"], x["v"], x.get("g"), x["beta"], steps,
        initial_state=x["h"], output_final_state=True, **options,
    )  # fmt: skip


def loop(x: dict[str, Tensor], steps: int):
    """The token loop of the delta rule, one step after another; only the first one decays."""
    state, out = x["h"], []
    for i in range(x["k"].shape[1]):
        token = slice(i // steps, i // steps + 1)
        g = x["g"][:, token] if "g" in x and i % steps == 0 else None
        k, v, beta = (x[name][:, i : i + 1] for name in ("k", "v", "beta"))
        o, state = reference.gated_delta_rule(x["q"][:, token], k, v, g, beta, state)
        out += [o] if i % steps == steps - 1 else []
    return torch.cat(out, 1), state


def test_the_token_loop_is_flas_naive():
    x = inputs(33, 2)
    single = {name: tensor.detach().float() for name, tensor in x.items()}
    theirs = naive_recurrent_gated_delta_product(
        *(single[name] for name in ("q", "k", "v", "g", "beta")), scale=16**-0.5,
        initial_state=single["h"], num_householder=2,
    )  # fmt: skip
    for found, exact, what in zip(theirs, loop(x, 2), ("o", "state"), strict=True):
        assert_equal(found.double(), exact, what, 1e-5)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("gated", [False, True])
def test_chunks_equal_the_token_loop(tokens: int, steps: int, gated: bool):
    x = inputs(tokens, steps, batch=2)
    if not gated:
        del x["g"]
    assert_same(lambda: product(x, steps), lambda: loop(x, steps), x)


@pytest.mark.parametrize("decay", [0.01, 30.0, 3000.0])
def test_weak_and_strong_decay(decay: float):
    x = inputs(65, 2, d_k=48, decay=decay)
    assert_same(lambda: product(x, 2), lambda: loop(x, 2), x)


def test_packed_documents_equal_each_alone():
    """Boundaries count tokens, not steps."""
    x = inputs(DOCUMENTS[-1], 2, states=len(DOCUMENTS) - 1)

    def alone():
        found = []
        for i, (start, end) in enumerate(zip(DOCUMENTS, DOCUMENTS[1:], strict=False)):
            part = {n: x[n][:, start:end] for n in ("q", "g")}
            part |= {n: x[n][:, 2 * start : 2 * end] for n in ("k", "v", "beta")}
            part["h"] = x["h"][i : i + 1]
            found.append((part["v"], part["h"]) if start == end else loop(part, 2))
        return torch.cat([o for o, _ in found], 1), torch.cat([s for _, s in found])

    assert_same(lambda: product(x, 2, cu_seqlens=torch.tensor(DOCUMENTS)), alone, x)


def test_the_norm_of_the_layer():
    x = inputs(70, 2)

    def theirs():
        q, k = (t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (x["q"], 2 * x["k"]))
        return loop(x | {"q": q, "k": k}, 2)

    def ours():
        return product(x | {"k": 2 * x["k"]}, 2, use_qk_l2norm_in_kernel=True)

    assert_same(ours, theirs, x)


@pytest.mark.parametrize("steps", [2, 3, 5])
@pytest.mark.parametrize("packed", [False, True])
def test_decoding_runs_the_steps_of_a_token_one_by_one(steps: int, packed: bool):
    """As the layer calls the recurrent operator: q at the last step, the decay at the first."""
    x = {name: tensor.detach() for name, tensor in inputs(1, steps, batch=3).items()}
    o, final = loop(x, steps)
    q, g = x["q"].new_zeros(3, steps, 2, 16), x["g"].new_zeros(3, steps, 2)
    q[:, -1], g[:, 0] = x["q"][:, 0], x["g"][:, 0]
    given = [q, x["k"], x["v"], g, x["beta"]]
    given = [t.reshape(1, -1, *t.shape[2:]) for t in given] if packed else given
    out, state = fused_recurrent_gated_delta_rule(
        *given[:4], beta=given[4], initial_state=x["h"], output_final_state=True,
        cu_seqlens=torch.arange(0, 3 * steps + 1, steps) if packed else None,
    )  # fmt: skip
    assert_equal(out.view(3, steps, 2, -1)[:, -1:], o, "o")
    assert_equal(state, final, "state")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_householder": 3}, "k has shape"),
        ({"g": torch.zeros(1, 16, 2)}, "g has shape"),
        ({"cu_seqlens": torch.tensor([0, 3])}, "must rise from 0 to 16"),
        ({"cp_context": object()}, "context parallelism"),
    ],
)
def test_wrong_arguments_say_what_is_wrong(change: dict, message: str):
    x = inputs(8, 2)
    given = {name: x[name] for name in ("q", "k", "v", "g", "beta")} | {"num_householder": 2}
    with pytest.raises((ValueError, NotImplementedError), match=message):
        chunk_gated_delta_product(**(given | change))
