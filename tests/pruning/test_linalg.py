"""strong_rrqr: its theorem, its pivots, and what it does where there is no obvious answer."""

import itertools
import math

import pytest
import scipy.linalg
import torch
from torch import Tensor

from pruning.linalg import strong_rrqr

EPS = torch.finfo(torch.float64).eps


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def graded(rows: int, d: int, decades: float, seed: int = 0) -> Tensor:
    """Singular values that fall by `decades` powers of ten, in random directions."""
    left = torch.linalg.qr(normal(rows, d, seed=seed)).Q
    right = torch.linalg.qr(normal(d, d, seed=seed + 1000)).Q
    return left @ torch.logspace(0, -decades, d, dtype=torch.float64).diag() @ right


def kahan(d: int, cosine: float) -> Tensor:
    """Kahan's matrix, on which QR with column pivoting exchanges nothing and reveals no rank."""
    powers = math.sqrt(1 - cosine**2) ** torch.arange(d, dtype=torch.float64)
    upper = torch.eye(d, dtype=torch.float64)
    upper -= cosine * torch.ones(d, d, dtype=torch.float64).triu(1)
    # Columns of exactly equal length would leave the order to rounding.
    return powers.diag() @ upper @ (1 - 1e-6 * torch.arange(d, dtype=torch.float64)).diag()


def pivots(matrix: Tensor, k: int) -> list[int]:
    """The columns that LAPACK's QR with column pivoting takes first."""
    order = scipy.linalg.qr(matrix.numpy(), mode="economic", pivoting=True)[2]
    return sorted(order[:k].tolist())


def assert_strong(matrix: Tensor, kept: Tensor, f: float) -> None:
    """Gu and Eisenstat's two inequalities, to what a Gram matrix resolves.

    Squared column lengths below d eps max(diag G) are rounding; d such columns make up the slack.
    """
    d, k = matrix.shape[1], len(kept)
    q = math.sqrt(1 + f * f * k * (d - k))
    whole = torch.linalg.svdvals(matrix)
    slack = d * math.sqrt(EPS) * matrix.norm(dim=0).max()
    selected = matrix[:, kept]
    assert (torch.linalg.svdvals(selected) >= whole[:k] / q - slack).all()
    basis, sizes, _ = torch.linalg.svd(selected, full_matrices=False)
    basis = basis[:, sizes > 1e-12 * sizes[0]]
    residual = matrix - basis @ (basis.mT @ matrix)
    left = torch.linalg.svdvals(residual - basis @ (basis.mT @ residual))
    beyond = torch.nn.functional.pad(whole[k:], (0, k))
    assert (left <= beyond[: len(left)] * q + slack).all()


@pytest.mark.parametrize("f", [1.05, 1.5, 2.0])
@pytest.mark.parametrize("decades", [0.0, 2.0, 5.0, 12.0])
def test_bound_holds_on_graded_matrices(decades: float, f: float) -> None:
    for seed, (d, k) in enumerate([(8, 3), (16, 8), (33, 20), (64, 32), (64, 63)]):
        matrix = graded(2 * d, d, decades, seed)
        assert_strong(matrix, strong_rrqr(matrix.mT @ matrix, k, f), f)


def test_bound_holds_on_gaussian_matrices_with_fewer_rows_than_columns() -> None:
    for seed in range(20):
        matrix = normal(12, 24, seed=seed)
        for k in (1, 5, 12, 18):
            assert_strong(matrix, strong_rrqr(matrix.mT @ matrix, k), 1.5)


@pytest.mark.parametrize("cosine", [0.1, 0.285, 0.4])
@pytest.mark.parametrize("d", [32, 64, 128])
def test_bound_holds_on_kahan_matrices(d: int, cosine: float) -> None:
    matrix = kahan(d, cosine)
    for k in (d // 2, d - 1):
        assert_strong(matrix, strong_rrqr(matrix.mT @ matrix, k), 1.5)


def test_bound_holds_where_pivoting_loses_the_rank_to_rounding() -> None:
    for cosine in (0.16, 0.196, 0.236, 0.252, 0.564, 0.692, 0.756, 0.828):
        for d, k in ((64, 50), (64, 63), (128, 64), (128, 127)):
            matrix = kahan(d, cosine)
            assert_strong(matrix, strong_rrqr(matrix.mT @ matrix, k), 1.5)


def test_pivoting_alone_breaks_the_bound_on_a_kahan_matrix() -> None:
    matrix = kahan(64, 0.285)
    unswapped = strong_rrqr(matrix.mT @ matrix, 63, max_swaps=0)
    assert unswapped.tolist() == pivots(matrix, 63)
    with pytest.raises(AssertionError):
        assert_strong(matrix, unswapped, 1.5)


def test_pivots_equal_lapack_on_the_whole_matrix() -> None:
    for seed in range(30):
        d = 5 + seed
        matrix = normal(3 * d, d, seed=seed) @ normal(d, d, seed=seed + 100)
        for k in (1, d // 2, d - 1):
            kept = strong_rrqr(matrix.mT @ matrix, k, max_swaps=0)
            assert kept.tolist() == pivots(matrix, k)


def test_no_exchange_of_the_result_grows_the_volume_beyond_f() -> None:
    swapped = 0
    for seed in range(40):
        d, k, f = 9, 4, 1.01
        matrix = graded(20, d, 3.0, seed)
        gram = matrix.mT @ matrix
        kept = strong_rrqr(gram, k, f).tolist()
        swapped += kept != pivots(matrix, k)
        volume = torch.linalg.det(gram[kept][:, kept])
        for i, j in itertools.product(kept, set(range(d)) - set(kept)):
            other = [c for c in kept if c != i] + [j]
            assert torch.linalg.det(gram[other][:, other]) <= (f * (1 + 1e-6)) ** 2 * volume
    assert swapped >= 5, "the matrices were meant to need exchanges"


def test_max_swaps_stops_early() -> None:
    found = 0
    for seed in range(40):
        matrix = graded(80, 40, 6.0, seed)
        gram = matrix.mT @ matrix
        results = [strong_rrqr(gram, 13, 1.01, cap).tolist() for cap in (0, 1, None)]
        moved = [len(set(results[0]) - set(result)) for result in results]
        assert moved[0] == 0 and moved[1] <= 1
        found += moved[2] > moved[1]
    assert found, "no matrix needed more than one exchange"


def test_every_matrix_of_a_batch_is_treated_as_if_alone() -> None:
    matrices = torch.stack([graded(64, 32, 0.5 * s, s) for s in range(11)] + [normal(64, 32)])
    matrices[3, :, 5:] = 0
    matrices[4, :, 9] = matrices[4, :, 2]
    gram = matrices.mT @ matrices
    together = strong_rrqr(gram.view(3, 4, 32, 32), 16, 1.05)
    assert together.shape == (3, 4, 16)
    alone = torch.stack([strong_rrqr(g, 16, 1.05) for g in gram])
    assert torch.equal(together.view(12, 16), alone)
    assert strong_rrqr(gram[:0], 16).shape == (0, 16)


def test_scale_does_not_matter() -> None:
    matrix = graded(40, 20, 4.0)
    gram = matrix.mT @ matrix
    expected = strong_rrqr(gram, 10)
    for scale in (1e-280, 1e-30, 3.0, 1e250):
        assert torch.equal(strong_rrqr(gram * scale, 10), expected)


def test_permuting_columns_permutes_the_answer() -> None:
    for seed in range(20):
        matrix = graded(60, 24, 3.0, seed)
        gram = matrix.mT @ matrix
        order = torch.randperm(24, generator=torch.Generator().manual_seed(seed))
        kept = strong_rrqr(gram[order][:, order], 12, 1.05)
        assert sorted(order[kept].tolist()) == strong_rrqr(gram, 12, 1.05).tolist()


def test_rank_deficient_matrices_keep_the_bound_and_fill_from_the_front() -> None:
    for seed in range(20):
        matrix = normal(50, 6, seed=seed) @ normal(6, 20, seed=seed + 50)
        gram = matrix.mT @ matrix
        core = strong_rrqr(gram, 6).tolist()
        for k in (3, 6, 10, 19):
            kept = strong_rrqr(gram, k)
            assert_strong(matrix, kept, 1.5)
            if k > 6:
                unused = [c for c in range(20) if c not in core][: k - 6]
                assert kept.tolist() == sorted(core + unused)


def test_zero_columns_come_last() -> None:
    matrix = normal(30, 12)
    matrix[:, [0, 3, 4]] = 0
    kept = strong_rrqr(matrix.mT @ matrix, 9).tolist()
    assert kept == [1, 2, 5, 6, 7, 8, 9, 10, 11]
    assert strong_rrqr(torch.zeros(5, 5, dtype=torch.float64), 3).tolist() == [0, 1, 2]


def test_of_duplicated_columns_the_first_is_kept() -> None:
    for seed in range(20):
        half = normal(30, 6, seed=seed)
        matrix = torch.cat([half, half.flip(1)], dim=1)
        kept = strong_rrqr(matrix.mT @ matrix, 6)
        assert kept.tolist() == [0, 1, 2, 3, 4, 5]


def test_of_constant_columns_one_is_kept() -> None:
    matrix = normal(100, 8)
    matrix[:, [2, 5, 7]] = 3.0
    kept = strong_rrqr(matrix.mT @ matrix, 6).tolist()
    assert kept == [0, 1, 2, 3, 4, 6]


def test_equal_columns_lengths_go_by_index() -> None:
    assert strong_rrqr(torch.eye(7, dtype=torch.float64), 4).tolist() == [0, 1, 2, 3]


def test_noise_of_another_summation_order_does_not_matter() -> None:
    for seed in range(20):
        matrix = normal(400, 16, seed=seed)
        matrix[:, 9], matrix[:, 4] = matrix[:, 1], 0.5
        parts = matrix.split(25)
        forward = sum((p.mT @ p for p in parts), torch.zeros(16, 16, dtype=torch.float64))
        pairs = [parts[i].mT @ parts[i] + parts[-1 - i].mT @ parts[-1 - i] for i in range(8)]
        backward = sum(reversed(pairs), torch.zeros(16, 16, dtype=torch.float64))
        assert not torch.equal(forward, backward)
        assert torch.equal(strong_rrqr(forward, 8), strong_rrqr(backward, 8))


def test_keeping_all_is_the_identity() -> None:
    matrix = graded(30, 10, 14.0)
    assert strong_rrqr(matrix.mT @ matrix, 10).tolist() == list(range(10))
    assert strong_rrqr(torch.ones(1, 1, dtype=torch.float64), 1).tolist() == [0]


@pytest.mark.parametrize("k", [0, -1, 9])
def test_impossible_counts_are_refused_with_the_numbers(k: int) -> None:
    with pytest.raises(ValueError, match=f"keep {k} of 8"):
        strong_rrqr(torch.eye(8, dtype=torch.float64), k)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_entries_are_named_by_batch_index(value: float) -> None:
    gram = torch.eye(30, dtype=torch.float64).repeat(20, 22, 1, 1)
    gram[17, 21, 3, 4] = value
    with pytest.raises(ValueError, match=r"\[17, 21\] holds a NaN or an infinity"):
        strong_rrqr(gram, 2)


def test_other_bad_matrices_are_refused() -> None:
    skew = torch.eye(4, dtype=torch.float64)
    skew[0, 1] = 1e-3
    with pytest.raises(ValueError, match="not symmetric"):
        strong_rrqr(skew, 2)
    with pytest.raises(ValueError, match=r"\[1\] has a negative diagonal"):
        strong_rrqr(torch.stack([torch.eye(4), -torch.eye(4)]).double(), 2)
    with pytest.raises(ValueError, match="float32"):
        strong_rrqr(torch.eye(4), 2)
    with pytest.raises(ValueError, match=r"\[4, 3\]"):
        strong_rrqr(torch.zeros(4, 3, dtype=torch.float64), 2)


@pytest.mark.parametrize("f", [1.0, 0.5, math.nan, -2.0, math.inf])
def test_f_must_be_above_one(f: float) -> None:
    with pytest.raises(ValueError, match="f above 1"):
        strong_rrqr(torch.eye(4, dtype=torch.float64), 2, f)


def test_negative_caps_are_refused() -> None:
    with pytest.raises(ValueError, match="max_swaps is -1"):
        strong_rrqr(torch.eye(4, dtype=torch.float64), 2, max_swaps=-1)
