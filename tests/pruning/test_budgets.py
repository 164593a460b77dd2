"""Ratios to widths."""

import math

import pytest

from flame.errors import UserError
from pruning.budgets import check_ratio, kernel_warning, parse_ratio, uniform_widths, width
from pruning.spaces import Space


@pytest.mark.parametrize(
    ("head_dim", "ratio", "kept"),
    [
        # arXiv 2602.04852: DeltaNet and Gated DeltaNet at 30, 40, 50 and 75 %.
        (128, 0.3, 89),
        (128, 0.4, 76),
        (128, 0.5, 64),
        (128, 0.75, 32),
        (256, 0.3, 179),
        (256, 0.4, 153),
        (256, 0.5, 128),
        (256, 0.75, 64),
    ],
)
def test_the_paper_s_widths(head_dim: int, ratio: float, kept: int) -> None:
    assert width(head_dim, ratio, multiple_of=1) == kept


def test_ratios_are_the_decimals_that_were_written() -> None:
    assert width(10, 0.9, 1) == 1 and math.floor(10 * (1 - 0.9)) == 0
    for percent in range(1, 100):
        assert width(100, percent / 100, 1) == 100 - percent


def test_widths_are_rounded_down_to_a_multiple_but_to_one_at_least() -> None:
    assert width(128, 0.3) == 80
    assert width(128, 0.99) == 16
    assert width(100, 0.25, 8) == 72


@pytest.mark.parametrize("ratio", [0, 1, -1, 1.5, math.nan, math.inf])
def test_ratios_outside_the_open_interval_are_refused(ratio: float) -> None:
    with pytest.raises(UserError, match="ratio .* is not between 0 and 1"):
        width(128, ratio)
    with pytest.raises(UserError):
        check_ratio(ratio)


def test_widths_that_do_not_change_are_refused() -> None:
    with pytest.raises(UserError, match="leaves 8 of 16 channels.*no reduction"):
        width(16, 0.5)
    with pytest.raises(UserError, match="no reduction"):
        width(8, 0.5)
    assert width(16, 0.01, 1) == 15


def test_a_multiple_below_one_is_refused() -> None:
    with pytest.raises(UserError, match="multiple of 0"):
        width(128, 0.5, 0)


def test_ratios_are_parsed() -> None:
    assert parse_ratio("0.5") == 0.5
    for text in ("half", "", "nan", "0", "1", "-1"):
        with pytest.raises(UserError, match="ratio"):
            parse_ratio(text)


def test_uniform_widths_name_every_space() -> None:
    spaces = [Space(f"layers.{i}.key", "key", i, 2, 64, ()) for i in range(3)]
    assert uniform_widths(spaces, 0.5) == {f"layers.{i}.key": 32 for i in range(3)}


def test_widths_beyond_the_kernels_are_pointed_out() -> None:
    assert kernel_warning(16) is None and kernel_warning(256) is None
    assert "not 8" in str(kernel_warning(8)) and "not 300" in str(kernel_warning(300))
