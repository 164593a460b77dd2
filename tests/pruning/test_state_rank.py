"""Ranks of states: as a rollout token by token has them, by definitions written out again."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from flame.checkpoint.load import load_model
from flame.checkpoint.reference import resolve
from flame.errors import UserError
from flame.process.distributed import process_group
from kernels.delta_rule import chunk_delta_rule
from kernels.gated_delta_rule import chunk_gated_delta_rule
from pruning.adapters import ADAPTERS
from pruning.op_call import OpCall
from pruning.state_rank import (
    cosine,
    gram_singular_values,
    measure,
    segment_means,
    singular_values,
    spearman,
    split,
    token_counts,
)
from pruning.states.analysis import MEASURES, Analysis, analyse_states, linear_spaces
from pruning.states.rollout import sampled_states, states_after
from pruning.taps import tap_ops
from tests.distributed import run_distributed
from tests.pruning.families import CONFIGS
from tests.pruning.models import FAMILIES, recurrent_states, weights, write_hf

MODELS: dict[str, dict[str, Any]] = {
    **FAMILIES,
    "sum norm": CONFIGS["delta_net sum norm, relu, negative eigenvalues"],
}
LENGTH = 150


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("state_rank")
    for name, config in MODELS.items():
        write_hf(folder / name, config, weights(config))
    return folder


def rows(number: int, length: int = LENGTH) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(80, (1, length), generator=generator) for _ in range(number)]


def analysed(folder: Path, texts: list[Tensor]) -> Analysis:
    with process_group():
        return analyse_states(resolve(folder), texts, token_counts(texts[0].shape[1]))


def calls_of(folder: Path, tokens: Tensor) -> tuple[dict[int, OpCall], list[tuple[int, Tensor]]]:
    """The delta-rule calls of a model by layer, and the states in its cache at the end."""
    reference = resolve(folder)
    adapter = ADAPTERS[reference.config["model_type"]]
    calls: dict[int, OpCall] = {}

    def keep(call: OpCall) -> None:
        calls[call.layer] = call

    model = load_model(reference)
    with tap_ops(model, adapter, keep):
        states = recurrent_states(model, tokens)
    return calls, states


def rollout(call: OpCall, sum_norm: bool) -> list[np.ndarray]:
    """The states [H, K, V] after every token, float64, by the recurrence as it is written down."""
    k, v, beta = (x[0].double().numpy() for x in (call.k, call.v, call.beta))
    k = k.repeat(v.shape[1] // k.shape[1], 1)
    if sum_norm:
        k = k / k.sum(-1, keepdims=True)
    else:
        k = k / np.sqrt((k * k).sum(-1, keepdims=True) + 1e-6)
    decay = np.ones_like(beta) if call.g is None else np.exp(call.g[0].double().numpy())
    state, found = np.zeros((v.shape[1], k.shape[2], v.shape[2])), []
    for token in range(len(k)):
        state = state * decay[token][:, None, None]
        error = v[token] - np.einsum("hkv,hk->hv", state, k[token])
        state = state + np.einsum("h,hk,hv->hkv", beta[token], k[token], error)
        found.append(state)
    return found


def by_definition(state: np.ndarray) -> dict[str, float]:
    """The figures of one state, one definition a line."""
    s = np.linalg.svd(state, compute_uv=False)
    stable = np.linalg.norm(state) ** 2 / np.linalg.norm(state, 2) ** 2
    p = s / s.sum()
    return {
        "stable_rank": stable,
        "utilisation": stable / min(state.shape),
        "threshold_rank": float((s > 1e-4 * s[0]).sum()),
        "entropy_rank": math.exp(-sum(x * math.log(x) for x in p if x > 0)),
        "nuclear_norm": np.linalg.norm(state, "nuc"),
        "sigma_1": s[0],
        "sigma_ratio": np.linalg.cond(state),
    }


@pytest.mark.parametrize("name", MODELS)
def test_figures_are_those_of_a_rollout_token_by_token(name: str, home: Path) -> None:
    texts = rows(2)
    analysis = analysed(home / name, texts)
    assert analysis.times == token_counts(LENGTH) and analysis.times[-1] == LENGTH
    calls, _ = calls_of(home / name, texts[1])
    assert analysis.layers == sorted(calls)
    for place, layer in enumerate(analysis.layers):
        states = rollout(calls[layer], sum_norm=name == "sum norm")
        for moment, time in enumerate(analysis.times):
            for head, state in enumerate(states[time - 1]):
                expected = by_definition(state)
                for metric in MEASURES:
                    found = float(analysis.values[metric][1, place, head, moment])
                    if metric == "sigma_ratio" and expected[metric] > 1e6:
                        # A singular state: what is left of the smallest value is rounding.
                        assert found > 1e5
                    else:
                        assert found == pytest.approx(expected[metric], rel=1e-5), (metric, time)


@pytest.mark.parametrize("name", MODELS)
def test_the_last_spectrum_is_that_of_the_state_in_the_models_cache(name: str, home: Path) -> None:
    texts = rows(1)
    analysis = analysed(home / name, texts)
    _, cached = calls_of(home / name, texts[0])
    for values, (_, states) in zip(analysis.spectra, cached, strict=True):
        expected = torch.linalg.svdvals(states.double())
        scale = float(expected.max())
        torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-5 * scale)


def test_decay_and_beta_are_means_since_the_time_before(home: Path) -> None:
    texts = rows(1)
    analysis = analysed(home / "gated_deltanet", texts)
    calls, _ = calls_of(home / "gated_deltanet", texts[0])
    for place, layer in enumerate(analysis.layers):
        call = calls[layer]
        assert call.g is not None
        start = 0
        for moment, end in enumerate(analysis.times):
            for metric, x in (("decay", call.g.double().exp()), ("beta", call.beta.double())):
                expected = x[0, start:end].mean(0)
                found = analysis.values[metric][0, place, :, moment]
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
            start = end
    assert (analysed(home / "delta_net", texts).values["decay"] == 1).all()


def on_this_rank(folder: Path, number: int) -> Analysis:
    return analyse_states(resolve(folder), rows(number, 64), token_counts(64))


def test_every_number_of_processes_gives_the_same_figures(home: Path) -> None:
    [one] = run_distributed(on_this_rank, 1, home / "gated_deltanet", 3)
    for other in run_distributed(on_this_rank, 2, home / "gated_deltanet", 3):
        assert (other.layers, other.times) == (one.layers, one.times)
        for metric, values in one.values.items():
            assert torch.equal(other.values[metric], values), metric
        assert all(map(torch.equal, other.spectra, one.spectra))


def complaint(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        analyse_states(resolve(folder), rows(1, 40), token_counts(40))
    return str(error.value)


def test_a_state_that_is_not_finite_names_layer_and_head_on_every_rank(
    home: Path, tmp_path: Path
) -> None:
    tensors = weights(FAMILIES["delta_net"])
    tensors["model.layers.1.attn.v_proj.weight"][16 + 3] = float("nan")
    write_hf(tmp_path / "broken", FAMILIES["delta_net"], tensors)
    texts = run_distributed(complaint, 2, tmp_path / "broken")
    expected = "layer 1 head 1: the state after token 1 is not finite: check the model's weights"
    assert texts == [expected, expected]


@pytest.mark.parametrize("gated", [True, False])
def test_states_come_from_one_pass_over_the_tokens(gated: bool) -> None:
    torch.manual_seed(0)
    operator = chunk_gated_delta_rule if gated else chunk_delta_rule
    k, v = torch.randn(2, 50, 2, 8).double(), torch.randn(2, 50, 4 if gated else 2, 6).double()
    beta, g = torch.rand(v.shape[:3]).double(), -torch.rand(v.shape[:3]).double()
    seen: list[int] = []

    def counted(**inputs: Any) -> Any:
        seen.append(inputs["k"].shape[1])
        return operator(**inputs)

    counts = [1, 2, 31, 33, 50]
    call = OpCall(0, k, k, v, beta, g if gated else None, None)
    for end, state in zip(counts, states_after(call, counted, counts), strict=True):
        part = {"q": k[:, :end], "k": k[:, :end], "v": v[:, :end], "beta": beta[:, :end]}
        part |= {"g": g[:, :end]} if gated else {}
        flags = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
        torch.testing.assert_close(state, operator(**part, **flags)[1], rtol=1e-10, atol=1e-12)
    assert seen == [1, 1, 29, 2, 17]


@pytest.mark.parametrize("packed", [True, False])
def test_states_are_sampled_along_each_document_and_at_its_end(packed: bool) -> None:
    torch.manual_seed(0)
    rows, length, steps = (1, 100, 1) if packed else (2, 50, 2)
    k, v = torch.randn(rows, length * steps, 2, 8), torch.randn(rows, length * steps, 4, 6)
    beta, g = torch.rand(v.shape[:3]), -torch.rand(v.shape[:3])
    bounds = torch.tensor([0, 32, 32, 33, 100]) if packed else None
    call = OpCall(0, k[:, ::steps], k, v, beta, g, bounds, steps=steps)
    documents = [(0, 0, 32), (0, 32, 33), (0, 33, 100)] if packed else [(0, 0, 50), (1, 0, 50)]
    expected = []
    for row, start, end in documents:
        for stop in sorted({*range(start + 16, end, 16), end}):
            part = {
                name: x[row : row + 1, start * steps : stop * steps].double()
                for name, x in {"q": k, "k": k, "v": v, "beta": beta, "g": g}.items()
            }
            flags = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
            expected.append(chunk_gated_delta_rule(**part, **flags)[1])
    found = torch.cat(list(sampled_states(call, chunk_gated_delta_rule, every=16)))
    assert found.dtype == torch.float64 and len(found) == len(expected)
    # They come segment by segment, here document by document: compare them as sets.
    ours, theirs = (
        x.flatten(1)[x.flatten(1)[:, 0].argsort()] for x in (found, torch.cat(expected))
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_threshold_rank_of_a_float32_gram_matrix_is_wrong_and_ours_is_right() -> None:
    torch.manual_seed(0)
    sizes = torch.cat([torch.logspace(0, -3.5, 32), torch.logspace(-6, -8, 32)]).double()
    left, right = (torch.linalg.qr(torch.randn(64, 64).double())[0] for _ in range(2))
    state = left * sizes @ right.T
    narrow = torch.linalg.eigvalsh(state.float().T @ state.float()).clamp_min(0).sqrt().flip(-1)
    assert measure(narrow.double()).threshold_rank > 32
    for values in (singular_values(state.float()), gram_singular_values(state)):
        assert measure(values).threshold_rank == 32
    torch.testing.assert_close(gram_singular_values(state[:40]), singular_values(state[:40]))
    torch.testing.assert_close(gram_singular_values(state.T), gram_singular_values(state))


def test_measures_of_known_spectra() -> None:
    flat, single, none = (torch.tensor(x).double() for x in ([2.0] * 4, [3.0, 0, 0, 0], [0.0] * 4))
    found = measure(torch.stack([flat, single, none]))
    for name in ("stable_rank", "threshold_rank", "entropy_rank"):
        assert getattr(found, name).tolist() == pytest.approx([4, 1, 0]), name
    assert found.utilisation.tolist() == pytest.approx([1, 0.25, 0])
    assert found.nuclear_norm.tolist() == [8, 3, 0]
    assert found.sigma_ratio[:2].tolist() == [1, math.inf] and found.sigma_ratio[2].isnan()
    assert measure(torch.tensor([1.0, 0.5, 0.1]).double(), epsilon=0.2).threshold_rank == 2


def test_times_are_log_spaced_with_powers_of_two_and_the_end() -> None:
    assert token_counts(8) == [1, 2, 3, 4, 6, 8]
    assert token_counts(1) == [1]
    assert token_counts(100, per_octave=1) == [1, 2, 4, 8, 16, 32, 64, 100]
    assert {128, 1024, 2048} <= set(token_counts(2048)) and len(token_counts(2048)) == 22
    with pytest.raises(ValueError, match="0 tokens"):
        token_counts(0)


def test_segment_means() -> None:
    x = torch.arange(6.0).view(6, 1)
    assert segment_means(x, [1, 3, 5]).flatten().tolist() == [0, 1.5, 3.5]


def test_the_split_is_the_best_of_all() -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        ranks = generator.gamma(2.0, size=17)
        groups = split(torch.from_numpy(ranks))
        ordered = np.sort(ranks)
        within = [n * ordered[:n].var() + (17 - n) * ordered[n:].var() for n in range(1, 17)]
        low = int((~groups.high).sum())
        assert within[low - 1] == pytest.approx(min(within))
        assert groups.separation == pytest.approx(1 - min(within) / (17 * ranks.var()))
        assert (torch.from_numpy(ranks) > groups.bound).equal(groups.high)


def test_the_split_says_how_far_groups_are_apart() -> None:
    apart = split(torch.tensor([1.0, 1.1, 0.9, 9.0, 9.2]))
    assert apart.high.tolist() == [False, False, False, True, True]
    assert apart.bound == pytest.approx((1.1 + 9.0) / 2) and apart.separation > 0.99
    even = split(torch.arange(1000.0))
    assert even.separation == pytest.approx(0.75, abs=1e-3)
    for alike in (torch.full((6,), 3.0), torch.ones(1), torch.full((4,), 0.1) * 3):
        groups = split(alike)
        assert math.isnan(groups.bound) and not groups.high.any()


def test_spearman_is_scipys_with_ties_too() -> None:
    generator = np.random.default_rng(1)
    for ties in (False, True):
        x, y = generator.normal(size=(2, 30))
        x, y = (np.round(x), np.round(y)) if ties else (x, y)
        expected = scipy.stats.spearmanr(x, y).statistic
        assert spearman(torch.from_numpy(x), torch.from_numpy(y)) == pytest.approx(expected)
    assert math.isnan(spearman(torch.ones(3), torch.arange(3.0)))


def test_cosine() -> None:
    assert cosine(torch.tensor([3.0, 0]), torch.tensor([1.0, 1])) == pytest.approx(0.5**0.5)
    assert math.isnan(cosine(torch.zeros(2), torch.ones(2)))


def test_models_without_a_linear_layer_are_refused() -> None:
    with pytest.raises(UserError, match="llama is no family with linear-attention layers"):
        linear_spaces({"model_type": "llama"})
    config = {**FAMILIES["delta_net"], "attn": {"layers": [0, 1], "num_heads": 2}}
    with pytest.raises(UserError, match="no linear-attention layer: config.json's attn names ev"):
        linear_spaces(config)
