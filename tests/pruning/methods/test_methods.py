"""Contract of every registered method, and what is particular to each."""

from collections.abc import Mapping
from dataclasses import FrozenInstanceError, fields, is_dataclass, replace
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from flame.options import entries
from pruning.layouts import Blocks, GroupedBlocks, HeadMajor, SharedHeads
from pruning.linalg import strong_rrqr
from pruning.methods import METHODS
from pruning.methods.drrqr import DeltaRuleRRQR
from pruning.methods.interface import Statistics, Weights, top_channels
from pruning.methods.jrnp import JointRankNorm
from pruning.methods.l1 import L1
from pruning.methods.pca import PCA
from pruning.methods.random import Random
from pruning.op_call import OpCall
from pruning.spaces import KINDS, Axis, Space, check_kept, rows
from pruning.statistics import (
    GradientShare,
    QueryKeyGram,
    Shard,
    Source,
    StateSpectra,
    Statistic,
)
from tests.pruning.replays import replay_of

HEADS, DIM, VALUES, HIDDEN = 3, 16, 8, 20
LAYOUT = HeadMajor(HEADS, DIM)
SPACE = Space(
    "layers.3.key",
    "key",
    3,
    HEADS,
    DIM,
    (
        Axis("q_proj.weight", 0, LAYOUT),
        Axis("k_proj.weight", 0, LAYOUT),
        Axis("q_conv1d.weight", 0, LAYOUT, "convolution"),
        Axis("k_conv1d.weight", 0, LAYOUT, "convolution"),
    ),
)
SHARED = SharedHeads(HEADS, VALUES)
VALUE = Space(
    "layers.3.value",
    "value",
    3,
    1,
    VALUES,
    (
        Axis("v_proj.weight", 0, SHARED),
        Axis("v_conv1d.weight", 0, SHARED, "convolution"),
        Axis("o_norm.weight", 0, SharedHeads(1, VALUES), "vector"),
        Axis("o_proj.weight", 1, SHARED),
    ),
)
HEAD = Space(
    "layers.3.head",
    "head",
    3,
    1,
    HEADS,
    (
        Axis("q_proj.weight", 0, Blocks(HEADS, DIM)),
        Axis("k_proj.weight", 0, Blocks(HEADS, DIM)),
        Axis("q_conv1d.weight", 0, Blocks(HEADS, DIM), "convolution"),
        Axis("k_conv1d.weight", 0, Blocks(HEADS, DIM), "convolution"),
        Axis("v_proj.weight", 0, Blocks(HEADS, VALUES)),
        Axis("b_proj.weight", 0, Blocks(HEADS, 1)),
        Axis("A_log", 0, Blocks(HEADS, 1), "vector"),
        Axis("o_proj.weight", 1, Blocks(HEADS, VALUES)),
    ),
)
VALUE_HEADS = Space(
    "layers.3.value-head",
    "value-head",
    3,
    HEADS,
    2,
    (
        Axis("v_proj.weight", 0, GroupedBlocks(HEADS, 2, VALUES // 2)),
        Axis("o_proj.weight", 1, GroupedBlocks(HEADS, 2, VALUES // 2)),
    ),
)
SPACES: dict[str, Space] = {space.kind: space for space in (SPACE, VALUE, HEAD, VALUE_HEADS)}
CASES = [(name, SPACES[kind]) for name, method in METHODS.items() for kind in method.kinds]
OF_KEYS = [name for name, space in CASES if space is SPACE]


def weights(seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    made = {
        axis.fqn: torch.randn(LAYOUT.size, *((HIDDEN,) if axis.role == "projection" else (1, 4)))
        for axis in SPACE.axes
    }
    shapes = {
        "v_proj.weight": (SHARED.size, HIDDEN),
        "v_conv1d.weight": (SHARED.size, 1, 4),
        "o_norm.weight": (VALUES,),
        "o_proj.weight": (HIDDEN, SHARED.size),
        "b_proj.weight": (HEADS, HIDDEN),
        "A_log": (HEADS,),
    }
    return made | {name: torch.randn(shape) for name, shape in shapes.items()}


def gradients() -> dict[str, Tensor]:
    return weights(seed=1)


def activations(seed: int = 0) -> OpCall:
    torch.manual_seed(seed)
    q, k = (torch.randn(1, 60, HEADS, DIM) @ torch.randn(DIM, DIM) for _ in range(2))
    v = torch.randn(1, 60, HEADS, VALUES)
    return OpCall(3, q, k, v, torch.rand(1, 60, HEADS), None, None)


def statistics(
    call: OpCall, space: Space = SPACE, gradient: Mapping[str, Tensor] | None = None
) -> dict[type[Statistic], Statistic]:
    """Every statistic of `space` that some method needs, of one call."""
    needed = {kind for method in METHODS.values() for kind in method.needs}
    totals = {kind: kind.zeros(space, HIDDEN) for kind in needed if space.kind in kind.kinds}
    torch.manual_seed(7)
    given = gradient or gradients()
    shards = {name: Shard(weight, given[name]) for name, weight in weights().items()}
    seen = {
        Source.OP: call,
        Source.MIXER_INPUT: torch.randn(60, HIDDEN),
        Source.OUTPUT: torch.randn(60, HEADS * VALUES)
        @ torch.randn(HEADS * VALUES, HEADS * VALUES),
        Source.REPLAY: replay_of(call),
        Source.STATE: torch.randn(5, HEADS, DIM, VALUES) * torch.rand(HEADS, 1, 1),
        Source.WEIGHT_GRADIENT: GradientShare(space, shards, call.tokens),
    }
    for total in totals.values():
        total.update(seen[total.source])
    return totals


def select(
    name: str, k: int, weights: Weights, statistics: Statistics, space: Space = SPACE
) -> Tensor:
    return METHODS[name]().select(space, k, weights, statistics)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_a_frozen_dataclass_whose_fields_explain_themselves(name: str) -> None:
    method: Any = METHODS[name]
    assert method.name == name and is_dataclass(method)
    declared = {entry.name: entry.declared.help for entry in entries(method)}
    assert list(declared) == [field.name for field in fields(method)]
    assert all(declared.values()), f"{name} has an option without a help text: {declared}"
    with pytest.raises(FrozenInstanceError):
        method().anything = 1


def test_a_method_names_the_kinds_that_its_statistics_serve() -> None:
    assert all(set(method.kinds) <= set(KINDS) and method.kinds for method in METHODS.values())
    for name, space in CASES:
        served = [kind for kind in METHODS[name].needs if space.kind in kind.kinds]
        assert served or not METHODS[name].needs, (name, space.kind)


@pytest.mark.parametrize(("name", "space"), CASES)
def test_selections_are_valid_and_deterministic(name: str, space: Space) -> None:
    for k in (1, space.head_dim // 2, space.head_dim):
        first = select(name, k, weights(), statistics(activations(), space), space)
        check_kept(space, rows(first))
        assert first.shape == (space.num_heads, k)
        torch.manual_seed(99)
        again = select(name, k, weights(), statistics(activations(), space), space)
        assert torch.equal(first, again)


@pytest.mark.parametrize(("name", "space"), CASES)
def test_keeping_all_is_the_identity(name: str, space: Space) -> None:
    sums = statistics(activations(), space)
    kept = select(name, space.head_dim, weights(), sums, space)
    assert torch.equal(kept, torch.arange(space.head_dim).repeat(space.num_heads, 1))


@pytest.mark.parametrize(("name", "space"), CASES)
def test_impossible_counts_are_refused_with_the_numbers(name: str, space: Space) -> None:
    sums, of = statistics(activations(), space), f"{space.head_dim} {space.noun} of {space.name}"
    for k in (0, -3, space.head_dim + 1):
        with pytest.raises(ValueError, match=f"keep {k} of {of}"):
            select(name, k, weights(), sums, space)


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].needs])
def test_statistics_without_tokens_are_refused(name: str) -> None:
    for kind in METHODS[name].kinds:
        space = SPACES[kind]
        empty = {k: k.zeros(space, HIDDEN) for k in METHODS[name].needs if kind in k.kinds}
        with pytest.raises(ValueError, match=f"{space.name}: no .* were seen, so {name} has"):
            select(name, 1, weights(), empty, space)


@pytest.mark.parametrize(("name", "space"), CASES)
def test_inputs_are_left_as_they_were(name: str, space: Space) -> None:
    given, sums = weights(), statistics(activations(), space)
    select(name, 2, given, sums, space)
    assert all(torch.equal(given[key], tensor) for key, tensor in weights().items())
    for kind, total in statistics(activations(), space).items():
        for field, tensor in total.state_dict().items():
            assert torch.equal(sums[kind].state_dict()[field], tensor)


@pytest.mark.parametrize("name", [n for n in OF_KEYS if n not in ("random", "pca")])
def test_permuting_the_channels_permutes_the_answer(name: str) -> None:
    call = activations()
    orders = torch.stack([torch.randperm(DIM) for _ in range(HEADS)])
    across = orders[None, None].expand(1, 60, -1, -1)
    shuffled = OpCall(
        3, call.q.gather(3, across), call.k.gather(3, across), call.v, call.beta, None, None
    )
    at = (orders + torch.arange(HEADS)[:, None] * DIM).flatten()
    names = {axis.fqn for axis in SPACE.axes}
    moved_weights = {n: t[at] if n in names else t for n, t in weights().items()}
    # A product does not mind which factor moves: only the gradients of q and k have to.
    products = {n: (gradients()[n] * t)[at] / t for n, t in weights().items() if n in names}
    kept = select(name, 6, weights(), statistics(call))
    moved = select(name, 6, moved_weights, statistics(shuffled, SPACE, gradients() | products))
    assert torch.equal(orders.gather(1, moved).sort(1).values, kept)


@pytest.mark.parametrize(
    ("name", "space"), [case for case in CASES if hasattr(METHODS[case[0]], "scores")]
)
def test_scores_rank_the_selection(name: str, space: Space) -> None:
    method: Any = METHODS[name]()
    given, sums = weights(), statistics(activations(), space)
    scores = method.scores(space, given, sums)
    assert scores.shape == (space.num_heads, space.head_dim) and scores.dtype == torch.float64
    assert float(scores.min()) >= 0
    if name != "output-error":
        # It chooses sets, by exchanges that no score of single channels can follow:
        # test_output_error.py says how its scores and sets relate.
        assert torch.equal(top_channels(space, 2, scores), method.select(space, 2, given, sums))


def test_scores_that_only_compare_within_a_head_are_relative_to_its_mean() -> None:
    for name, space in CASES:
        if name in ("l1", "l2", "wanda", "activation-norm"):
            method: Any = METHODS[name]()
            scores = method.scores(space, weights(), statistics(activations(), space))
            means = scores.mean(1)
            torch.testing.assert_close(means, torch.ones_like(means))


@pytest.mark.parametrize("name", OF_KEYS)
def test_other_heads_do_not_matter(name: str) -> None:
    call, given = activations(), weights()
    kept = select(name, 6, given, statistics(call))
    call.q[:, :, 1:] += 1
    for axis in SPACE.axes:
        given[axis.fqn][DIM:] *= 2
    assert torch.equal(select(name, 6, given, statistics(call))[0], kept[0])


def test_drrqr_pivots_like_qr_of_the_stacked_queries_and_keys() -> None:
    call = activations()
    kept = DeltaRuleRRQR(max_swaps=0).select(SPACE, 6, {}, statistics(call))
    for head in range(HEADS):
        stacked = torch.cat([call.q[0, :, head], call.k[0, :, head]]).double().numpy()
        order = scipy.linalg.qr(stacked, mode="economic", pivoting=True)[2]
        assert kept[head].tolist() == sorted(order[:6].tolist())


def test_drrqr_passes_its_options_on() -> None:
    total = QueryKeyGram.zeros(SPACE)
    total.update(activations())
    for f in (1.01, 3.0):
        kept = DeltaRuleRRQR(f=f).select(SPACE, 6, {}, {QueryKeyGram: total})
        assert torch.equal(kept, strong_rrqr(total.gram, 6, f))
    with pytest.raises(ValueError, match="f above 1"):
        DeltaRuleRRQR(f=0.5).select(SPACE, 6, {}, {QueryKeyGram: total})


def test_drrqr_of_a_subset_of_the_rows_and_of_permuted_columns() -> None:
    call = activations()
    call.sampled = (torch.arange(0, 60, 2), torch.arange(5))
    kept = DeltaRuleRRQR(rows=5000).select(SPACE, 6, {}, statistics(call))
    subset = torch.cat([call.q[0, ::2], call.k[0, :5]]).double().transpose(0, 1)
    assert torch.equal(kept, strong_rrqr(subset.mT @ subset, 6))
    with pytest.raises(ValueError, match="rows is 3000: .* so give 5000 or leave it out"):
        DeltaRuleRRQR(rows=3000)
    # Among equal columns the order decides.
    equal = {QueryKeyGram: QueryKeyGram.zeros(SPACE)}
    equal[QueryKeyGram].gram += torch.eye(DIM)
    equal[QueryKeyGram].tokens += 1
    plain = DeltaRuleRRQR().select(SPACE, 6, {}, equal)
    assert plain.tolist() == [list(range(6))] * HEADS
    shuffled = [
        DeltaRuleRRQR(permute_columns=True, seed=seed).select(SPACE, 6, {}, equal).tolist()
        for seed in (0, 0, 1)
    ]
    assert shuffled[0] == shuffled[1] != shuffled[2]
    assert len({tuple(row) for row in shuffled[0]}) == HEADS
    whole = statistics(activations())
    assert torch.equal(
        DeltaRuleRRQR(permute_columns=True).select(SPACE, 6, {}, whole),
        DeltaRuleRRQR().select(SPACE, 6, {}, whole),
    )


@pytest.mark.parametrize("options", [{}, {"queries": True}, {"uncentered": True}])
def test_pca_projects_on_the_eigenvectors_of_the_normalised_keys(options: dict) -> None:
    call, given = activations(), weights()
    method, sums = PCA(**options), statistics(call)
    projected = method.new_tensors(SPACE, 5, given, sums)
    scores = method.scores(SPACE, given, sums)
    for head in range(HEADS):
        rows = [x[0, :, head].double() for x in (call.k, call.q)][
            : 2 if "queries" in options else 1
        ]
        unit = np.concatenate([(x / (x.square().sum(1, True) + 1e-6).sqrt()).numpy() for x in rows])
        center = 0 if "uncentered" in options else unit.mean(0)
        _, sizes, components = np.linalg.svd(unit - center, full_matrices=False)
        np.testing.assert_allclose(scores[head], sizes**2 / len(unit), rtol=1e-9)
        components = components[:5]
        components *= np.sign(components[np.arange(5), np.abs(components).argmax(1)])[:, None]
        at, to = slice(head * DIM, (head + 1) * DIM), slice(head * 5, (head + 1) * 5)
        for name in ("q_proj.weight", "k_proj.weight"):
            expected = components @ given[name][at].double().numpy()
            np.testing.assert_allclose(projected[name][to], expected, rtol=1e-7, atol=1e-9)
        kernel = given["q_conv1d.weight"][at, 0].double().numpy()
        np.testing.assert_allclose(
            projected["q_conv1d.weight"][to, 0], components**2 @ kernel, rtol=1e-7, atol=1e-9
        )


def test_pca_keeps_different_numbers_of_components_in_different_heads() -> None:
    given, sums = weights(), statistics(activations())
    ragged, even = (PCA().new_tensors(SPACE, k, given, sums) for k in ((2, 5, 3), 5))
    for name, tensor in ragged.items():
        expected = [even[name][head * 5 : head * 5 + k] for head, k in enumerate((2, 5, 3))]
        assert torch.equal(tensor, torch.cat(expected))


def test_pca_refuses_what_cannot_be_mixed() -> None:
    space = replace(SPACE, axes=(*SPACE.axes, Axis("dt_bias", 0, LAYOUT, "vector")))
    given = weights() | {"dt_bias": torch.ones(LAYOUT.size)}
    with pytest.raises(ValueError, match="pca mixes key channels, and dt_bias acts on each"):
        PCA().new_tensors(space, 5, given, statistics(activations()))


@pytest.mark.parametrize(
    ("config", "exact"),
    [
        ({"model_type": "gated_deltanet"}, "silu acts on each channel"),
        ({"model_type": "gated_deltanet", "qk_activation": "identity"}, "silu acts on each"),
        ({"model_type": "delta_net"}, "silu acts on each channel"),
        ({"model_type": "delta_net", "qk_activation": "identity"}, "convolution kernels of their"),
        (
            {"model_type": "delta_net", "qk_activation": "identity", "use_short_conv": False},
            None,
        ),
        ({"model_type": "delta_net2", "qk_activation": "identity"}, None),
        ({"model_type": "delta_net2", "qk_activation": "identity", "qk_norm": "sum"}, "'sum' does"),
        (
            {"model_type": "delta_net2", "qk_activation": "identity", "conv_sharing": "channel"},
            "convolution kernels of their own",
        ),
    ],
)
def test_pca_says_whether_it_is_exact(config: dict, exact: str | None) -> None:
    [note] = PCA().notes(config, ("key",))
    assert ("the projection is exact" in note) == (exact is None)
    assert (exact or "") in note


def test_jrnp_mixes_rank_and_norm_and_removes_either_end() -> None:
    total = StateSpectra.zeros(HEAD)
    values = torch.tensor([[4.0, 4, 4], [6.0, 5e-4, 0], [1.0, 1, 2e-5]]).double()
    total.update(torch.diag_embed(values)[None])
    ranks = torch.tensor([3, 1, 2]) / 3
    norms = values.sum(1) / 12
    for alpha in (0.0, 0.3, 1.0):
        expected = alpha * ranks + (1 - alpha) * norms
        low = JointRankNorm(alpha=alpha, direction="low").scores(HEAD, {}, {StateSpectra: total})
        high = JointRankNorm(alpha=alpha).scores(HEAD, {}, {StateSpectra: total})
        torch.testing.assert_close(low[0], expected.double())
        torch.testing.assert_close(high, 1 - low)
    method = JointRankNorm(alpha=1.0, epsilon=1e-5, direction="low")
    assert method.scores(HEAD, {}, {StateSpectra: total})[0].tolist() == pytest.approx(
        [1, 2 / 3, 1]
    )
    kept = [
        JointRankNorm(direction=d).select(HEAD, 2, {}, {StateSpectra: total}).tolist()
        for d in ("high", "low")
    ]
    assert kept == [[[1, 2]], [[0, 1]]]
    for options, message in (
        ({"alpha": 1.5}, "alpha is 1.5: give 0 to 1"),
        ({"direction": "up"}, "direction is 'up': choose from high, low"),
        ({"epsilon": 1.0}, "epsilon is 1.0: give at least 1e-12 and less than 1"),
    ):
        with pytest.raises(ValueError, match=message):
            JointRankNorm(**options)


def test_l1_adds_up_the_rows_of_both_projections_and_ignores_convolutions() -> None:
    given = weights()
    expected = given["q_proj.weight"].double().abs().sum(1)
    expected += given["k_proj.weight"].double().abs().sum(1)
    expected = expected.view(HEADS, DIM)
    torch.testing.assert_close(
        L1().scores(SPACE, given, {}), expected / expected.mean(1, keepdim=True)
    )


def test_l1_gives_ties_to_the_lower_index_and_refuses_nan() -> None:
    given = {name: torch.ones_like(tensor) for name, tensor in weights().items()}
    given["k_proj.weight"][DIM + 9] *= 2
    kept = L1().select(SPACE, 3, given, {})
    assert kept.tolist() == [[0, 1, 2], [0, 1, 9], [0, 1, 2]]
    given["q_proj.weight"][5, 5] = float("nan")
    with pytest.raises(ValueError, match="layers.3.key: the scores hold a NaN"):
        L1().select(SPACE, 3, given, {})


def test_random_depends_on_seed_space_and_head_only() -> None:
    other = Space("layers.4.key", "key", 4, HEADS, DIM, ())
    chosen = [
        Random(seed).select(space, 8, {}, {}).tolist()
        for seed in (0, 1)
        for space in (SPACE, other)
    ]
    rows = {tuple(row) for kept in chosen for row in kept}
    assert len(rows) == 4 * HEADS
    torch.manual_seed(5)
    assert Random(0).select(SPACE, 8, {}, {}).tolist() == chosen[0]


def test_random_keeps_subsets_of_what_it_keeps_more_of() -> None:
    few, many = (Random(3).select(SPACE, k, {}, {}) for k in (4, 9))
    for head in range(HEADS):
        assert set(few[head].tolist()) < set(many[head].tolist())


def test_randoms_scores_are_uniform_and_fall_as_it_chooses() -> None:
    scores = torch.stack([Random(seed).scores(SPACE, {}, {}) for seed in range(100)])
    kept = Random(3).select(SPACE, 5, {}, {})
    assert torch.equal(scores[3].topk(5, dim=-1).indices.sort(dim=-1).values, kept)
    assert scores.mean().item() == pytest.approx(0.5, abs=0.02)
    assert scores.var().item() == pytest.approx(1 / 12, rel=0.05)
    # Heads differ in what lies above one threshold, as shared budgets need.
    assert (scores[3] > 0.5).sum(-1).unique().numel() > 1 or HEADS == 1


def test_random_chooses_uniformly() -> None:
    counts = torch.zeros(DIM)
    for seed in range(300):
        kept = Random(seed).select(SPACE, 4, {}, {})
        counts += torch.bincount(kept.flatten(), minlength=DIM)
    expected = 300 * HEADS * 4 / DIM
    # Chi-squared with 15 degrees of freedom exceeds 37.7 once in a thousand times.
    assert ((counts - expected) ** 2 / expected).sum() < 37.7
