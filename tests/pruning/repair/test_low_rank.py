"""The best map of lower rank: no other has a smaller error in the metric of the inputs."""

import pytest
import torch
from torch import Tensor

from pruning.repair.low_rank import best_low_rank

ROWS, D, HIDDEN = 30, 12, 20


def problem(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Second and first factor, and inputs [n, hidden] of very unequal directions."""
    torch.manual_seed(seed)
    scales = torch.logspace(0, -3, HIDDEN, dtype=torch.float64)
    mixing = torch.linalg.qr(torch.randn(HIDDEN, HIDDEN, dtype=torch.float64)).Q
    inputs = torch.randn(500, HIDDEN, dtype=torch.float64) * scales @ mixing
    second = torch.randn(ROWS, D, dtype=torch.float64)
    return second, torch.randn(D, HIDDEN, dtype=torch.float64), inputs


def fitted(rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    second, first, inputs = problem()
    inner = inputs @ first.mT
    return *best_low_rank(second, first, inner.mT @ inner, rank), second @ first, inputs


def error(made: Tensor, wanted: Tensor, inputs: Tensor) -> Tensor:
    return (inputs @ (made - wanted).mT).square().sum()


def test_the_whole_width_is_the_same_map() -> None:
    up, down, wanted, _ = fitted(D)
    torch.testing.assert_close(up @ down, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rank", [1, 5, 11])
def test_the_error_is_the_least_that_the_rank_allows(rank: int) -> None:
    """Equal to the tail of the singular values of the outputs, which bounds every rank-r map."""
    up, down, wanted, inputs = fitted(rank)
    tail = torch.linalg.svdvals(inputs @ wanted.mT)[rank:].square().sum()
    assert up.shape == (ROWS, rank)
    assert down.shape == (rank, HIDDEN)
    assert float(error(up @ down, wanted, inputs) / tail) == pytest.approx(1, rel=1e-6)


def test_no_step_and_no_descent_makes_it_smaller() -> None:
    up, down, wanted, inputs = fitted(5)
    best = error(up @ down, wanted, inputs)
    factors = [torch.nn.Parameter(x.clone()) for x in (up, down)]
    error(factors[0] @ factors[1], wanted, inputs).backward()
    size = float(inputs.square().sum() * wanted.square().sum().sqrt())
    assert all(float(x.grad.norm()) < 1e-10 * size for x in factors)
    for step in (1e-3, 1e-1, 1):
        moved = [x + step * torch.randn_like(x) for x in (up, down)]
        assert error(moved[0] @ moved[1], wanted, inputs) > best


def test_plain_truncation_is_worse() -> None:
    """The metric counts: the best map for white inputs is not the best for these."""
    up, down, wanted, inputs = fitted(5)
    u, s, v = torch.linalg.svd(wanted, full_matrices=False)
    white = u[:, :5] * s[:5] @ v[:5]
    assert error(white, wanted, inputs) > 1.1 * error(up @ down, wanted, inputs)


def test_fewer_rows_than_channels_and_nothing_seen_leave_zeros() -> None:
    second, first, inputs = problem()
    inner = inputs @ first.mT
    up, down = best_low_rank(second[:3], first, inner.mT @ inner, 8)
    torch.testing.assert_close(up @ down, second[:3] @ first)
    assert up.shape == (3, 8)
    with pytest.raises(ValueError, match="not finite"):
        best_low_rank(second, first, torch.full((D, D), torch.nan, dtype=torch.float64), 3)
