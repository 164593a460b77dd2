"""Which set of channels goes when errors add up."""

from itertools import combinations

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
    grams = torch.stack([gram_of(seed) for seed in range(20)])
    found_best = 0
    for gram, kept in zip(grams, least_error(grams, k), strict=True):
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


def test_channels_whose_changes_cancel_go_together() -> None:
    gram = torch.diag(torch.tensor([9.0, 9, 4])).double()
    gram[0, 1] = gram[1, 0] = -8.9
    assert least_error(gram[None], 1).tolist() == [[2]]
    assert least_error(gram.diagonal().diag()[None], 1).tolist() == [[0]]


def test_ties_keep_the_lower_index() -> None:
    assert least_error(torch.eye(6).double()[None], 2).tolist() == [[0, 1]]
    assert least_error(torch.zeros(2, 6, 6).double(), 3).tolist() == [[0, 1, 2]] * 2


def test_errors_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="the output errors hold a NaN"):
        least_error(torch.full((1, 3, 3), torch.nan).double(), 2)
