"""Query noise: the closed forms on constructed states, and the tap on a real model."""

import math

import pytest
import torch
from torch import Tensor

from launch.evaluation.query_noise import (
    amplification,
    query_noise,
    random_query_amplification,
    table,
)
from tests.pruning.families import build
from tests.pruning.models import DELTA_NET, GATED_DELTANET

KEY_DIM, VALUE_DIM = 16, 24


def flat_state(rank: int, seed: int = 0) -> Tensor:
    """A state with `rank` singular values of 3 and otherwise zeros."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((KEY_DIM, KEY_DIM), (VALUE_DIM, VALUE_DIM))
    left, right = (
        torch.linalg.qr(torch.randn(shape, generator=generator, dtype=torch.float64))[0]
        for shape in shapes
    )
    return 3.0 * left[:, :rank] @ right[:, :rank].T


def random_queries(number: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(number, KEY_DIM, generator=generator, dtype=torch.float64)


def noisy_error(state: Tensor, queries: Tensor, noise: float, seed: int) -> Tensor:
    """Relative errors of the outputs for one draw of noise of relative size `noise`, [n]."""
    draws = torch.randn(
        queries.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    errors = draws * noise * queries.norm(dim=-1, keepdim=True) / queries.shape[-1] ** 0.5
    return (errors @ state).norm(dim=-1) / (queries @ state).norm(dim=-1)


def test_low_rank_amplifies_and_full_rank_does_not() -> None:
    queries = random_queries(20_000)
    measured = [float(amplification(flat_state(rank), queries)) for rank in (1, 2, 4, 8, 16)]
    assert measured == sorted(measured, reverse=True)
    assert measured[-1] == pytest.approx(1.0, abs=1e-12)
    for rank, value in zip((1, 2, 4, 8, 16), measured, strict=True):
        expected = float(random_query_amplification(torch.tensor(rank), KEY_DIM))
        # The logarithm of a Beta(1/2, …) variable has variance 4.9 at most: three sigma of 20,000.
        assert math.log(value) == pytest.approx(math.log(expected), abs=3 * (4.95 / 20_000) ** 0.5)
    assert measured[0] > 3


def test_rank_one_in_the_limit() -> None:
    limit = float(random_query_amplification(torch.tensor(1.0), 1 << 20))
    assert limit == pytest.approx(2 * math.exp(0.5772156649), rel=1e-5)


@pytest.mark.parametrize("rank", [1, 3, 16])
def test_amplification_is_the_mean_square_of_sampled_errors(rank: int) -> None:
    query, state = random_queries(1, seed=4), flat_state(rank)
    errors = noisy_error(state, query.expand(40_000, -1), 0.1, seed=0)
    # Squares of errors have a relative deviation of sqrt(2 / rank): three sigma of 40,000.
    assert float(errors.square().mean()) == pytest.approx(
        0.01 * float(amplification(state, query)), rel=3 * (2 / 40_000 / rank) ** 0.5
    )


def test_error_grows_in_proportion_to_the_noise() -> None:
    queries, state = random_queries(50), flat_state(5)
    small, large = (noisy_error(state, queries, noise, seed=2) for noise in (0.01, 0.2))
    torch.testing.assert_close(large, 20 * small)


def test_a_query_along_the_leading_direction_gains() -> None:
    left = torch.linalg.qr(random_queries(KEY_DIM))[0]
    values = torch.linspace(1, 0.1, KEY_DIM, dtype=torch.float64)
    state = left * values
    stable_rank = float(values.square().sum())
    leading, last = left[:, :1].T, left[:, -1:].T
    assert float(amplification(state, leading)) == pytest.approx(stable_rank / KEY_DIM)
    assert float(amplification(state, last)) == pytest.approx(stable_rank / KEY_DIM * 100)


KDA = {**GATED_DELTANET, "model_type": "kda"}
PRODUCT = {
    **DELTA_NET,
    "model_type": "gated_deltaproduct",
    "head_dim": 16,
    "num_householder": 2,
    "use_forget_gate": True,
}
SUM_NORM = {**DELTA_NET, "qk_norm": "sum", "qk_activation": "relu"}
CONFIGS = [GATED_DELTANET, DELTA_NET, KDA, PRODUCT, SUM_NORM]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c["model_type"] + c.get("qk_norm", ""))
def test_a_models_heads_as_from_a_rollout(config: dict) -> None:
    model = build(config, seed=0).eval()
    tokens = torch.randint(0, 300, (2, 20), generator=torch.Generator().manual_seed(0))
    asked = torch.tensor([[3, 7, 19], [0, 18, 11]])
    records = query_noise(model, config, tokens, asked, length=15)
    heads = config.get("num_v_heads", config["num_heads"])
    assert [(r.layer, r.head) for r in records] == [(i, h) for i in (0, 1) for h in range(heads)]
    states, queries = rollout(model, config, tokens, length=15)
    queries = torch.stack([queries[:, row, :, asked[row]] for row in (0, 1)], 1)
    expected = amplification(states, queries).log().mean(1).exp().flatten().tolist()
    assert [r.amplification for r in records] == pytest.approx(expected, rel=1e-4)
    spectra = torch.linalg.svdvals(states)
    stable = (spectra.square().sum(-1) / spectra[..., 0].square()).mean(1).flatten().tolist()
    assert [r.stable_rank for r in records] == pytest.approx(stable, rel=1e-4)
    assert len(table(records).rows) == len(records)


def rollout(
    model: torch.nn.Module, config: dict, tokens: Tensor, length: int
) -> tuple[Tensor, Tensor]:
    """States `[layer, B, H, K, V]` token by token in float64, and queries `[layer, B, H, T, K]`."""
    from pruning.adapters import ADAPTERS
    from pruning.op_call import OpCall
    from pruning.taps import tap_ops

    calls: list[OpCall] = []
    with torch.no_grad(), tap_ops(model, ADAPTERS[config["model_type"]], calls.append):
        model(input_ids=tokens, use_cache=False)
    states, queries = [], []
    for call in calls:
        share = call.v.shape[2] // call.k.shape[2]
        q, k = (x.double().repeat_interleave(share, 2) for x in (call.q, call.k))
        g = torch.zeros_like(call.beta) if call.g is None else call.g
        if config.get("qk_norm") == "sum":
            k = k / k.sum(-1, keepdim=True)
        else:
            k = k / (k.square().sum(-1, keepdim=True) + 1e-6).sqrt()
        state = torch.zeros(*k.shape[:1], *k.shape[2:], call.v.shape[-1], dtype=torch.float64)
        for t in range(length * call.steps):
            decay = g[:, t].double().exp()
            state = state * (decay[..., None, None] if decay.ndim == 2 else decay.unsqueeze(-1))
            seen = (k[:, t, :, :, None] * state).sum(-2)
            write = call.beta[:, t].double()[..., None] * (call.v[:, t].double() - seen)
            state = state + k[:, t, :, :, None] * write[..., None, :]
        states.append(state)
        queries.append(q.transpose(1, 2))
    return torch.stack(states), torch.stack(queries)
