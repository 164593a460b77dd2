"""Contract of every registered method, and what is particular to each."""

from dataclasses import FrozenInstanceError, fields, is_dataclass
from typing import Any

import pytest
import scipy.linalg
import torch
from torch import Tensor

from pruning.linalg import strong_rrqr
from pruning.methods import METHODS
from pruning.methods.drrqr import DeltaRuleRRQR
from pruning.methods.interface import Statistics, Weights, top_channels
from pruning.methods.l1 import L1
from pruning.methods.random import Random
from pruning.spaces import Axis, HeadMajor, Space, check_kept, rows
from pruning.statistics import QueryKeyGram, Statistic
from pruning.taps import OpCall

HEADS, DIM = 3, 16
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


def weights(seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {
        axis.fqn: torch.randn(LAYOUT.size, *((20,) if axis.role == "projection" else (1, 4)))
        for axis in SPACE.axes
    }


def activations(seed: int = 0) -> OpCall:
    torch.manual_seed(seed)
    q, k = (torch.randn(1, 60, HEADS, DIM) @ torch.randn(DIM, DIM) for _ in range(2))
    return OpCall(3, q, k, torch.randn(1, 60, HEADS, 4), torch.rand(1, 60, HEADS), None, None)


def statistics(call: OpCall) -> dict[type[Statistic], Statistic]:
    """Every statistic that some method needs, of one call."""
    needed = {kind for method in METHODS.values() for kind in method.needs}
    totals = {kind: kind.zeros(SPACE) for kind in needed}
    for total in totals.values():
        total.update(call)
    return totals


def select(name: str, k: int, weights: Weights, statistics: Statistics) -> Tensor:
    return METHODS[name]().select(SPACE, k, weights, statistics)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_a_frozen_dataclass_whose_fields_explain_themselves(name: str) -> None:
    method: Any = METHODS[name]
    assert method.name == name and is_dataclass(method)
    for field in fields(method):
        assert field.metadata["help"], f"{name}.{field.name} has no help text"
    with pytest.raises(FrozenInstanceError):
        method().anything = 1


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("k", [1, 7, DIM])
def test_selections_are_valid_and_deterministic(name: str, k: int) -> None:
    first = select(name, k, weights(), statistics(activations()))
    check_kept(SPACE, rows(first))
    assert first.shape == (HEADS, k)
    torch.manual_seed(99)
    assert torch.equal(first, select(name, k, weights(), statistics(activations())))


@pytest.mark.parametrize("name", METHODS)
def test_keeping_all_is_the_identity(name: str) -> None:
    kept = select(name, DIM, weights(), statistics(activations()))
    assert torch.equal(kept, torch.arange(DIM).repeat(HEADS, 1))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("k", [0, -3, DIM + 1])
def test_impossible_counts_are_refused_with_the_numbers(name: str, k: int) -> None:
    with pytest.raises(ValueError, match=f"keep {k} of {DIM} key channels of layers.3.key"):
        select(name, k, weights(), statistics(activations()))


@pytest.mark.parametrize("name", METHODS)
def test_inputs_are_left_as_they_were(name: str) -> None:
    given, sums = weights(), statistics(activations())
    select(name, 5, given, sums)
    assert all(torch.equal(given[key], tensor) for key, tensor in weights().items())
    for kind, total in statistics(activations()).items():
        for field, tensor in total.state_dict().items():
            assert torch.equal(sums[kind].state_dict()[field], tensor)


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if "seed" not in m.__annotations__])
def test_permuting_the_channels_permutes_the_answer(name: str) -> None:
    call = activations()
    orders = torch.stack([torch.randperm(DIM) for _ in range(HEADS)])
    across = orders[None, None].expand(1, 60, -1, -1)
    shuffled = OpCall(
        3, call.q.gather(3, across), call.k.gather(3, across), call.v, call.beta, None, None
    )
    rows = (orders + torch.arange(HEADS)[:, None] * DIM).flatten()
    kept = select(name, 6, weights(), statistics(call))
    moved = select(
        name, 6, {key: tensor[rows] for key, tensor in weights().items()}, statistics(shuffled)
    )
    assert torch.equal(orders.gather(1, moved).sort(1).values, kept)


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if hasattr(m, "scores")])
def test_scores_rank_the_selection(name: str) -> None:
    method: Any = METHODS[name]()
    given, sums = weights(), statistics(activations())
    scores = method.scores(SPACE, given, sums)
    assert scores.shape == (HEADS, DIM) and scores.dtype == torch.float64
    assert torch.equal(top_channels(SPACE, 6, scores), method.select(SPACE, 6, given, sums))


@pytest.mark.parametrize("name", METHODS)
def test_other_heads_do_not_matter(name: str) -> None:
    call, given = activations(), weights()
    kept = select(name, 6, given, statistics(call))
    call.q[:, :, 1:] += 1
    for tensor in given.values():
        tensor[DIM:] *= 2
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


def test_drrqr_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="layers.3.key: no tokens"):
        DeltaRuleRRQR().select(SPACE, 6, {}, {QueryKeyGram: QueryKeyGram.zeros(SPACE)})


def test_l1_adds_up_the_rows_of_both_projections_and_ignores_convolutions() -> None:
    given = weights()
    expected = given["q_proj.weight"].double().abs().sum(1)
    expected += given["k_proj.weight"].double().abs().sum(1)
    torch.testing.assert_close(L1().scores(SPACE, given, {}).flatten(), expected)


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


def test_random_chooses_uniformly() -> None:
    counts = torch.zeros(DIM)
    for seed in range(300):
        kept = Random(seed).select(SPACE, 4, {}, {})
        counts += torch.bincount(kept.flatten(), minlength=DIM)
    expected = 300 * HEADS * 4 / DIM
    # Chi-squared with 15 degrees of freedom exceeds 37.7 once in a thousand times.
    assert ((counts - expected) ** 2 / expected).sum() < 37.7
