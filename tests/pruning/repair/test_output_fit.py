"""The ridge regression of a repair against a plain least-squares solver."""

import numpy as np
import pytest
import torch
from torch import Tensor

from pruning.repair.output_fit import RIDGE, fitted_projection


def problem(tokens: int = 90) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Dense projection, what is left of it, and outputs of dense and pruned layer."""
    torch.manual_seed(0)
    dense, mixing = torch.randn(7, 12).double(), torch.randn(12, 9).double()
    z = torch.randn(tokens, 12).double() @ torch.randn(12, 12).double()
    return dense, dense[:, :9], z, z @ mixing + torch.randn(tokens, 9).double()


def test_it_is_the_least_squares_solution_with_the_documented_ridge() -> None:
    dense, left, z, pruned = problem()
    found = fitted_projection(dense, left, pruned.mT @ pruned, z.mT @ pruned)
    root = (0.01 * pruned.square().sum() / 9).sqrt()
    rows = torch.cat([pruned, root * torch.eye(9).double()])
    wanted = torch.cat([z @ dense.mT, root * left.mT])
    expected = np.linalg.lstsq(rows.numpy(), wanted.numpy(), rcond=None)[0].T
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-10)
    assert RIDGE == 0.01


def test_scaling_all_outputs_changes_nothing() -> None:
    dense, left, z, pruned = problem()
    one, other = (
        fitted_projection(dense, left, c * c * (pruned.mT @ pruned), c * c * (z.mT @ pruned))
        for c in (1.0, 1e-6)
    )
    torch.testing.assert_close(one, other, rtol=1e-9, atol=0.0)


def test_layers_that_did_not_change_keep_their_projection() -> None:
    dense, _, z, _ = problem()
    # Fewer tokens than channels leave a singular matrix, which the ridge makes invertible.
    few = z[:5]
    found = fitted_projection(dense, dense, few.mT @ few, few.mT @ few)
    torch.testing.assert_close(found, dense, rtol=1e-9, atol=1e-10)


def test_sums_without_an_answer_are_refused() -> None:
    dense, left, z, pruned = problem()
    zeros = torch.zeros(9, 9).double()
    with pytest.raises(ValueError, match="gives zeros to its output projection for all tokens"):
        fitted_projection(dense, left, zeros, z.mT @ pruned)
    with pytest.raises(ValueError, match="the sums hold a NaN or an infinity"):
        fitted_projection(dense, left, zeros / 0, z.mT @ pruned)
