"""Outer products summed in short pieces: their error, what is chosen from them, who uses them."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pruning.linalg import strong_rrqr
from pruning.spaces import Space
from pruning.statistics import (
    HeadOutputErrors,
    HeadOutputGram,
    KeyOutputErrors,
    NormalisedGrams,
    QueryKeyGram,
    QueryKeySample,
    ValueOutputErrors,
)
from pruning.statistics.output_errors import add_changes_, root
from pruning.statistics.products import (
    SCRATCH,
    add_products_,
    add_products_in_pieces_,
    error_bound,
    piece_length,
)
from tests.pruning.replays import replay_of
from tests.pruning.statistics.test_statistics import HEADS, SPACE, VALUES, op_call, outputs

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def exactly(x: Tensor) -> Tensor:
    return torch.einsum("nmhi,nmhj->hij", x.double(), x.double())


def in_pieces(x: Tensor) -> Tensor:
    gram = torch.zeros(x.shape[2], x.shape[3], x.shape[3], dtype=torch.float64)
    add_products_in_pieces_(gram, x)
    return gram


def as_a_matrix_unit(x: Tensor) -> Tensor:
    """Blocks of 16 rows exact, each added to a float32 sum by cutting digits off."""
    gram = torch.zeros(x.shape[2], x.shape[3], x.shape[3], dtype=torch.float64)
    for piece in x.flatten(0, 1).split(piece_length(x.dtype)):
        total = torch.zeros(gram.shape)
        for block in piece.split(16):
            exact = total.double() + exactly(block[None])
            near = exact.float()
            beyond = near.double().abs() > exact.abs()
            total = torch.where(beyond, near.nextafter(torch.zeros(())), near)
        gram += total
    return gram


def graded(rows: int, d: int, condition: float, seed: int, mixed: bool) -> Tensor:
    """Rows with singular values from 1 to 1 / condition, along channels or mixed ones."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.logspace(0, -math.log10(condition), d, dtype=torch.float64)
    mixing = torch.randn(d, d, generator=generator, dtype=torch.float64)
    x = torch.randn(1, rows, 1, d, generator=generator, dtype=torch.float64) * values
    return x @ torch.linalg.qr(mixing)[0] if mixed else x[..., torch.randperm(d)]


@pytest.mark.parametrize("arithmetic", [in_pieces, as_a_matrix_unit])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("d", "condition"), [(64, 1e2), (64, 1e4), (96, 1e4)])
def test_what_is_kept_is_what_float64_keeps(
    d: int, condition: float, dtype: torch.dtype, mixed: bool, arithmetic: Callable
) -> None:
    x = graded(2000, d, condition, seed=d, mixed=mixed).to(dtype)
    found, expected = arithmetic(x), exactly(x)
    for k in (d // 4, d // 2, 3 * d // 4):
        assert torch.equal(strong_rrqr(found, k), strong_rrqr(expected, k))


@pytest.mark.parametrize("arithmetic", [in_pieces, as_a_matrix_unit])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 63, 64, 65, 1000])
def test_the_error_is_within_its_bound(rows: int, dtype: torch.dtype, arithmetic: Callable) -> None:
    if arithmetic is as_a_matrix_unit and dtype == torch.float64:
        pytest.skip("rows in float64 are rounded before they reach a matrix unit")
    generator = torch.Generator().manual_seed(rows)
    scales = torch.logspace(-3, 2, 24)
    # Of one sign, so that errors of cut digits add up.
    x = (torch.rand(2, rows, 3, 24, generator=generator) * scales).to(dtype)
    found, expected = arithmetic(x), exactly(x)
    lengths = expected.diagonal(dim1=-2, dim2=-1).sqrt()
    error = ((found - expected).abs() / (lengths[:, :, None] * lengths[:, None])).max()
    assert error <= error_bound(dtype)
    if rows == 1000:
        assert 0 < error < error_bound(dtype) / 10
    assert torch.equal(found, found.mT)


def test_pieces_that_do_not_fit_in_memory_together_are_summed_in_turn() -> None:
    d = 256
    rows = SCRATCH // d**2 * piece_length(torch.float32) + 20
    x = torch.randn(1, rows, 1, d, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(in_pieces(x), exactly(x), rtol=1e-6, atol=1e-2)


def test_rows_may_lie_anywhere_in_memory() -> None:
    x = torch.randn(2, 3, 70, 24, generator=torch.Generator().manual_seed(0)).transpose(1, 2)
    assert torch.equal(in_pieces(x), in_pieces(x.contiguous()))
    assert torch.equal(in_pieces(x[:, :0]), torch.zeros(3, 24, 24, dtype=torch.float64))


def test_every_gram_matrix_of_the_statistics_can_be_summed_in_pieces() -> None:
    seen = {
        QueryKeyGram: op_call(1, 90, dtype=torch.bfloat16),
        QueryKeySample: op_call(1, 90, dtype=torch.bfloat16),
        NormalisedGrams: op_call(1, 90, dtype=torch.bfloat16),
        HeadOutputGram: outputs(1),
        KeyOutputErrors: replay_of(op_call(1, 90)),
        ValueOutputErrors: replay_of(op_call(1, 90)),
        HeadOutputErrors: replay_of(op_call(1, 90)),
    }
    for kind, given in seen.items():
        space: Space = {"head": HEADS, "value": VALUES, "key": SPACE}[kind.kinds[0]]
        exact, pieces = kind.zeros(space), kind.zeros(space)
        called: list[int] = []

        def counted(gram: Tensor, *rows: Tensor, called: list[int] = called) -> None:
            called.append(len(rows))
            add_products_in_pieces_(gram, *rows)

        pieces.add_products_ = counted  # type: ignore[method-assign]
        exact.update(given)
        pieces.update(given)
        assert called
        for name, total in exact.state_dict().items():
            scale = float(total.abs().max())
            torch.testing.assert_close(pieces.state_dict()[name], total, rtol=0, atol=1e-5 * scale)


def test_errors_of_channels_summed_in_pieces_are_within_their_bound() -> None:
    generator = torch.Generator().manual_seed(0)
    # Projections that nearly lose a direction, and changes that lie mostly in it.
    scales = torch.logspace(0, -3, 12, dtype=torch.float64)
    mixing = torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=torch.float64))[0]
    weight = torch.randn(40, 12, generator=generator, dtype=torch.float64) * scales @ mixing
    changes = torch.randn(8, 900, 12, generator=generator) / scales @ mixing
    changes = changes.float()
    exact, pieces = (torch.zeros(8, 8, dtype=torch.float64) for _ in range(2))
    factor = root(weight)
    add_changes_(add_products_, exact, changes, factor)
    add_changes_(add_products_in_pieces_, pieces, changes, factor)
    wanted = torch.einsum("itw,jtw->ij", changes.double() @ weight.mT, changes.double() @ weight.mT)
    torch.testing.assert_close(exact, wanted, rtol=1e-10, atol=1e-10 * float(wanted.max()))
    g = exact.diagonal().sqrt()
    e = (12 + 2) * 2.0**-24 * (changes.double().abs() @ factor.abs().mT).flatten(1).norm(dim=1)
    bound = e[:, None] * g + g[:, None] * e + e[:, None] * e
    bound += error_bound(torch.float32) * (g + e)[:, None] * (g + e)
    error = (pieces - exact).abs() / bound
    assert 0 < float(error.max()) <= 1


def test_float32_products_are_not_cut_to_tf32_and_a_users_choice_stays() -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    seen: list[str] = []

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            if func is torch.ops.aten.bmm.default:
                seen.append(matmul.fp32_precision)
            return func(*args, **(kwargs or {}))

    try:
        matmul.fp32_precision = "tf32"
        gram = torch.zeros(1, 8, 8, dtype=torch.float64)
        with Watched():
            add_products_in_pieces_(gram, torch.randn(1, 16, 1, 8))
        assert seen == ["ieee"] and matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before


def test_float64_is_the_way_of_a_statistic_by_itself() -> None:
    assert QueryKeyGram.zeros(SPACE).add_products_ is add_products_
