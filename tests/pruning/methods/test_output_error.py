"""Which set of channels goes when errors add up."""

from itertools import combinations, product

import pytest
import torch
from torch import Tensor

from pruning.methods.output_error import least_error


def gram_of(seed: int, channels: int = 9, rows: int = 12) -> Tensor:
    changes = torch.randn(channels, rows, generator=torch.Generator().manual_seed(seed)).double()
    return changes @ changes.mT


def error(gram: Tensor, kept: Tensor) -> float:
    dropped = torch.ones(len(gram)).double()
    dropped[kept] = 0
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
