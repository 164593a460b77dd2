"""Which set of channels goes when errors add up."""

from itertools import combinations, product

import pytest
import torch
from torch import Tensor

from pruning.methods.interface import top_channels
from pruning.methods.output_error import OutputError, least_error
from pruning.spaces import Space
from pruning.statistics import KeyOutputErrors


def gram_of(seed: int, channels: int = 9, rows: int = 12) -> Tensor:
    changes = torch.randn(channels, rows, generator=torch.Generator().manual_seed(seed)).double()
    return changes @ changes.mT


def error(gram: Tensor, kept: Tensor) -> float:
    dropped = torch.ones(len(gram)).double()
    dropped[kept.long()] = 0
    return float(dropped @ gram @ dropped)


@pytest.mark.parametrize("k", [1, 4, 8])
def test_no_exchange_of_two_channels_lowers_the_error(k: int) -> None:
    found_best = 0
    for gram in map(gram_of, range(20)):
        kept = least_error(gram, k, 9)[0]
        reached, rest = error(gram, kept), sorted(set(range(9)) - set(kept.tolist()))
        assert kept.tolist() == sorted(set(kept.tolist())) and len(kept) == k
        for leaves in range(k):
            for enters in rest:
                exchanged = kept.clone()
                exchanged[leaves] = enters
                assert error(gram, exchanged) >= reached - 1e-9
        best = min(error(gram, torch.tensor(some)) for some in combinations(range(9), k))
        found_best += reached <= best + 1e-9
    assert found_best >= 15


@pytest.mark.parametrize("k", [1, 2])
def test_heads_of_a_layer_are_chosen_together(k: int) -> None:
    """Every group keeps as many, and no exchange within a group lowers the error of the layer."""
    found_best = apart = 0
    for gram in (gram_of(seed, rows=4) for seed in range(20)):
        kept = least_error(gram, k, 3)
        assert kept.shape == (3, k)
        some = list(combinations(range(3), k))
        sets = [
            torch.cat([torch.tensor(row) + 3 * group for group, row in enumerate(rows)])
            for rows in product(some, repeat=3)
        ]
        reached = error(gram, (kept + 3 * torch.arange(3)[:, None]).flatten())
        found_best += reached <= min(error(gram, each) for each in sets) + 1e-9
        blocks = torch.stack([part[:, 3 * g : 3 * g + 3] for g, part in enumerate(gram.split(3))])
        apart += not torch.equal(kept, torch.cat([least_error(b, k, 3) for b in blocks]))
    assert found_best >= 12 and apart >= 5


@pytest.mark.parametrize("seed", range(5))
def test_scores_of_a_set_that_goes_first_are_at_least_its_error(seed: int) -> None:
    gram = gram_of(seed)
    space = Space("layers.0.key", "key", 0, 1, 9, ())
    statistic = KeyOutputErrors(gram[None], torch.tensor(1))
    [scores] = OutputError().scores(space, {}, {KeyOutputErrors: statistic})
    gone: list[int] = []
    for _ in range(9):
        rest = [channel for channel in range(9) if channel not in gone]
        after = {c: error(gram, torch.tensor([k for k in rest if k != c])) for c in rest}
        gone.append(min(after, key=after.__getitem__))
        assert float(scores[gone].sum()) >= after[gone[-1]] - 1e-9
    assert scores[gone].tolist() == sorted(scores.tolist())
    independent = torch.diag(torch.tensor([3.0, 1, 2])).double()
    statistic = KeyOutputErrors(independent[None], torch.tensor(1))
    three = Space("layers.0.key", "key", 0, 1, 3, ())
    found = OutputError().scores(three, {}, {KeyOutputErrors: statistic})
    assert found.tolist() == [[3.0, 1.0, 2.0]]


@pytest.mark.parametrize("k", [1, 4, 8])
def test_what_is_selected_errs_no_more_than_the_largest_scores(k: int) -> None:
    space = Space("layers.0.key", "key", 0, 2, 9, ())
    better = 0
    for seed in range(20):
        grams = torch.stack([gram_of(seed), gram_of(seed + 20)])
        given = {KeyOutputErrors: KeyOutputErrors(grams, torch.tensor(1))}
        ranked = top_channels(space, k, OutputError().scores(space, {}, given))
        selected = OutputError().select(space, k, {}, given)
        for gram, rank, select in zip(grams, ranked, selected, strict=True):
            assert error(gram, select) <= error(gram, rank) + 1e-9
            better += error(gram, select) < error(gram, rank) - 1e-9
    assert better > 0
    apart = torch.diag_embed(torch.rand(2, 9, generator=torch.Generator().manual_seed(k)).double())
    given = {KeyOutputErrors: KeyOutputErrors(apart, torch.tensor(1))}
    ranked = top_channels(space, k, OutputError().scores(space, {}, given))
    assert torch.equal(ranked, OutputError().select(space, k, {}, given))


def test_channels_whose_changes_cancel_go_together() -> None:
    gram = torch.diag(torch.tensor([9.0, 9, 4])).double()
    gram[0, 1] = gram[1, 0] = -8.9
    assert least_error(gram, 1, 3).tolist() == [[2]]
    assert least_error(gram.diagonal().diag(), 1, 3).tolist() == [[0]]


def test_ties_keep_the_lower_index() -> None:
    assert least_error(torch.eye(6).double(), 2, 6).tolist() == [[0, 1]]
    assert least_error(torch.zeros(12, 12).double(), 3, 6).tolist() == [[0, 1, 2]] * 2


def test_errors_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="the output errors hold a NaN"):
        least_error(torch.full((3, 3), torch.nan).double(), 2, 3)
