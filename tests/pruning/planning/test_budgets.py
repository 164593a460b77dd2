"""Ratios, widths and bytes to numbers of kept channels."""

import math
from typing import Any

import pytest

from flame.errors import UserError
from flame.models.widths import kernel_warning
from pruning.adapters import adapter_for
from pruning.planning.budgets import Budget, uniform_widths, width
from pruning.planning.per_kind import check_ratio, parse_per_kind, parse_ratio, parse_width
from pruning.planning.plan import spaces_of_kinds

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


def widths(**budget: Any) -> dict[str, int]:
    asked = Budget(**budget)
    adapter = adapter_for(CONFIG)
    spaces = spaces_of_kinds(adapter, CONFIG, asked.kinds)
    return dict(uniform_widths(asked, adapter, CONFIG, spaces))


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
    assert Budget(0.5).record() == {"ratio": 0.5, "multiple_of": 16, "space": "key"}
    asked = Budget(width={"head": 2, "key": 64}, space="key,head", allocate="model")
    assert asked.record() == {
        "width": "key=64,head=2",
        "multiple_of": 16,
        "space": "key,head",
        "allocate": "model",
    }


def test_widths_beyond_the_kernels_are_pointed_out() -> None:
    assert kernel_warning(16) is None and kernel_warning(256) is None
    assert "not 8" in str(kernel_warning(8)) and "not 300" in str(kernel_warning(300))
