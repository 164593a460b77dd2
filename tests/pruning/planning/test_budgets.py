"""Ratios, widths and bytes to numbers of kept channels."""

import math
from dataclasses import replace
from typing import Any

import pytest

from flame.errors import UserError
from flame.models.widths import kernel_warning
from pruning.adapters import adapter_for
from pruning.planning.budgets import Budget, departures, uniform_widths
from pruning.planning.choose import check_budget
from pruning.planning.per_kind import check_ratio, parse_per_kind, parse_ratio, parse_width
from pruning.planning.plan import spaces_of_kinds
from pruning.planning.rounding import default_multiple, width

CONFIG: dict[str, Any] = {
    "model_type": "gated_deltanet",
    "hidden_size": 512,
    "num_hidden_layers": 3,
    "num_heads": 4,
    "num_v_heads": 8,
    "head_dim": 128,
    "expand_v": 0.75,
    "attn": {"layers": [1], "num_heads": 4},
}
"""States of 8 heads of 128 x 96 in two layers: 786,432 bytes."""


def widths(config: dict[str, Any] = CONFIG, **budget: Any) -> dict[str, int]:
    asked = Budget(**budget)
    adapter = adapter_for(config)
    spaces = spaces_of_kinds(adapter, config, asked.kinds)
    return dict(uniform_widths(asked, adapter, config, spaces))


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


def test_the_multiple_fits_small_heads() -> None:
    assert {size: default_multiple(size) for size in (256, 128, 96, 64, 32, 16, 8, 5)} == {
        256: 16, 128: 16, 96: 8, 64: 8, 32: 4, 16: 2, 8: 1, 5: 1
    }  # fmt: skip
    assert [width(32, ratio) for ratio in (0.1, 0.25, 0.5, 0.75, 0.9)] == [28, 24, 16, 8, 4]
    small = {**CONFIG, "head_dim": 32, "expand_v": 2}
    assert widths(small, ratio=0.25, space="key,value") == {"key": 24, "value": 48}


@pytest.mark.parametrize(
    ("budget", "lines"),
    [
        ({"ratio": 0.5, "space": "key,value,head"}, []),
        ({"width": 16}, []),
        ({"ratio": 0.3, "paper": True}, []),
        (
            {"ratio": 0.3},
            [
                "--ratio 0.3 keeps 80 of 128 key channels, which removes 37.5 % and not 30 %: "
                "widths are multiples of 16; --multiple-of 1 keeps 89"
            ],
        ),
        (
            {"ratio": 0.9},
            [
                "--ratio 0.9 keeps 16 of 128 key channels, which removes 87.5 % and not 90 %: "
                "widths are multiples of 16; --multiple-of 1 keeps 12"
            ],
        ),
        (
            {"ratio": {"key": 0.5, "head": 0.4}, "space": "key,head"},
            [
                "--ratio 0.4 keeps 2 of 4 heads, which removes 50 % and not 40 %: heads go "
                "whole, so give a ratio that is near one of 0.25 (3) or 0.5 (2)"
            ],
        ),
        # Two layers have 8 heads together, of which 4.8 were asked for.
        ({"ratio": 0.4, "space": "head", "allocate": "model"}, ["keeps 4 of 8 heads"]),
    ],
)
def test_a_width_that_is_far_from_the_ratio_is_said(
    budget: dict[str, Any], lines: list[str]
) -> None:
    asked = Budget(**budget)
    adapter = adapter_for(CONFIG)
    spaces = spaces_of_kinds(adapter, CONFIG, asked.kinds)
    found = list(departures(asked, spaces, widths(**budget)))
    assert len(found) == len(lines)
    assert all(line in said for line, said in zip(lines, found, strict=True))
    if lines:
        with pytest.raises(UserError, match="--strict-ratio: --ratio"):
            check_budget(replace(asked, strict_ratio=True), CONFIG)
    else:
        check_budget(replace(asked, strict_ratio=True), CONFIG)


@pytest.mark.parametrize("ratio", [0, 1, -1, 1.5, math.nan, math.inf])
def test_ratios_outside_the_open_interval_are_refused(ratio: float) -> None:
    with pytest.raises(UserError, match="ratio .* is not between 0 and 1"):
        width(128, ratio)
    with pytest.raises(UserError):
        check_ratio(ratio)


def test_widths_that_do_not_change_are_refused() -> None:
    with pytest.raises(UserError, match="leaves 8 of 16 channels.*no reduction"):
        width(16, 0.5, 16)
    with pytest.raises(UserError, match="no reduction"):
        width(8, 0.5, 8)
    with pytest.raises(UserError, match="leaves 0 of 1 heads, of which one stays"):
        width(1, 0.5, 1, "heads")
    assert width(16, 0.01, 1) == 15


def test_a_multiple_below_one_is_refused() -> None:
    with pytest.raises(UserError, match="multiple of 0"):
        width(128, 0.5, 0)


def test_numbers_are_parsed_for_all_kinds_or_for_each() -> None:
    assert parse_ratio("0.5") == 0.5 == parse_per_kind("0.5", parse_ratio)
    assert parse_per_kind("head=0.25, key=0.5", parse_ratio) == {"head": 0.25, "key": 0.5}
    assert parse_per_kind("key=64,value=32", parse_width) == {"key": 64, "value": 32}
    for text in ("half", "", "nan", "0", "1", "-1", "key=2", "state=0.5", "key=0.5,0.2"):
        with pytest.raises(UserError):
            parse_per_kind(text, parse_ratio)
    with pytest.raises(UserError, match="'key=0.5,key=0.6' says key twice"):
        parse_per_kind("key=0.5,key=0.6", parse_ratio)
    for text in ("0", "-3", "1.5", "wide"):
        with pytest.raises(UserError, match=f"width {text!r} is not a whole number"):
            parse_per_kind(text, parse_width)


def test_each_kind_has_its_width() -> None:
    every = "key,value,head"
    assert widths(ratio=0.5, space=every) == {"key": 64, "value": 48, "head": 2}
    assert widths(ratio={"key": 0.75, "head": 0.3}, space="head,key") == {"key": 32, "head": 2}
    assert widths(width={"key": 80, "head": 3}, space="key,head") == {"key": 80, "head": 3}
    assert widths(width=50, space="value", multiple_of=1) == {"value": 50}


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"ratio": 0.5, "space": "keys"}, "unknown kind of space 'keys': choose from key, value"),
        ({"ratio": 0.5, "space": ""}, "unknown kind of space ''"),
        ({"ratio": 0.5, "space": "key,key"}, "--space key,key names a kind twice"),
        ({"ratio": {"value": 0.5}}, "--ratio value=0.5 is for a kind that is not pruned: --space"),
        ({"ratio": {"key": 0.5}, "space": "key,head"}, "--ratio says nothing of head"),
        ({"width": {"head": 2}}, "--width head=2 is for a kind that is not pruned"),
        ({"width": 128}, "--width key=128 is no reduction: a model with 128 key channels can keep"),
        ({"width": 144}, "--width key=144 is out of range: a model with 128 key channels can keep"),
        ({"width": 4, "space": "head"}, "--width head=4 is no reduction: a model with 4 heads"),
        ({"width": 60}, "--width key=60 is not a multiple of 16: take 48 or 64, or --multiple-of"),
        ({"width": 10}, "--width key=10 is not a multiple of 16: take 16, or --multiple-of 1"),
        ({}, "exactly one of --ratio, --width and --state-bytes"),
        ({"ratio": 0.5, "width": 64}, "exactly one of"),
        ({"state_bytes": 786432}, "the state takes 786432 already, nothing to prune"),
        ({"state_bytes": 98303}, "98303 is too little: 16 of 128 key channels, the fewest in mult"),
        (
            {"state_bytes": 1, "space": "head"},
            "1 of 4 heads, the fewest in multiples of 1, take 19",
        ),
        ({"state_bytes": 10**6, "space": "key"}, "takes 786432 already"),
        ({"state_bytes": 500000, "space": "key,head"}, "sets the width of one kind, not of key,he"),
        ({"state_bytes": 500000, "multiple_of": 128}, "no multiple of 128 is below the 128 key"),
    ],
)
def test_budgets_that_make_no_sense_are_refused(budget: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        widths(**budget)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("limit", "budget", "kept"),
    [
        (786431, {}, {"key": 112}),
        (786432 // 2, {}, {"key": 64}),
        (786432 // 2 - 1, {}, {"key": 48}),
        (786432 // 2 + 6143, {"multiple_of": 1}, {"key": 64}),
        (786432 // 2 + 6144, {"multiple_of": 1}, {"key": 65}),
        (98304, {}, {"key": 16}),
        (786432 // 2, {"space": "value"}, {"value": 48}),
        (786432 // 2, {"space": "head"}, {"head": 2}),
    ],
)
def test_the_largest_width_whose_state_fits(
    limit: int, budget: dict[str, Any], kept: dict[str, int]
) -> None:
    assert widths(state_bytes=limit, **budget) == kept


def test_a_plan_records_what_was_asked_for() -> None:
    assert Budget(0.5).record() == {"ratio": 0.5, "space": "key"}
    assert Budget(0.5, paper=True).record() == {"ratio": 0.5, "multiple_of": 1, "space": "key"}
    asked = Budget(width={"head": 2, "key": 64}, space="key,head", allocate="model", multiple_of=32)
    assert asked.record() == {
        "width": "key=64,head=2",
        "multiple_of": 32,
        "space": "key,head",
        "allocate": "model",
    }


def test_widths_beyond_the_kernels_are_pointed_out() -> None:
    assert kernel_warning(16) is None and kernel_warning(256) is None
    assert "not 8" in str(kernel_warning(8)) and "not 300" in str(kernel_warning(300))


def test_value_heads_are_counted_within_a_group() -> None:
    grouped = {**CONFIG, "num_v_heads": 12}
    assert widths(grouped, ratio=0.5, space="value-head") == {"value-head": 1}
    assert widths(grouped, ratio=0.3, space="head,value-head") == {"head": 2, "value-head": 2}
    # A third of 1,179,648 bytes is one of three value heads in each group.
    assert widths(grouped, state_bytes=393216, space="value-head") == {"value-head": 1}
    with pytest.raises(UserError, match="because each of its key heads serves one value head"):
        widths({**CONFIG, "num_v_heads": None}, ratio=0.5, space="value-head")
