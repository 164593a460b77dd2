"""Standard errors by documents, and paired differences, against what they must cover."""

import math

import numpy as np
import pytest

from launch.evaluation.intervals import (
    FEWEST,
    MOST_BLOCKS,
    DocumentLosses,
    difference,
    differences,
    joined,
    read_losses,
    standard_error,
    won_back,
)


def draw(random: np.random.Generator, documents: int = 60) -> tuple[DocumentLosses, DocumentLosses]:
    """Two models on the same documents, hard and easy ones; the second loses 0.02 nats more."""
    tokens = random.integers(20, 400, documents)
    hard = random.normal(3.0, 0.8, documents)
    gap = random.normal(0.02, 0.05, documents)
    return (
        DocumentLosses((tokens * hard).tolist(), tokens.tolist()),
        DocumentLosses((tokens * (hard + gap)).tolist(), tokens.tolist()),
    )


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    random = np.random.default_rng(3)
    inside = near = 0
    for _ in range(150):
        one, other = draw(random)
        found = difference(other, one)
        assert found is not None and found.documents == 60
        inside += found.low <= 0.02 <= found.high
        error = standard_error(one)
        assert error is not None
        near += abs(sum(one.losses) / sum(one.tokens) - 3.0) < 1.96 * error
    # 95 % of 150 is 142, give or take 3 a standard deviation; bootstraps of 60 are a little narrow.
    assert 132 <= inside <= 149 and 132 <= near <= 149


def test_a_pair_is_surer_than_its_two_models() -> None:
    one, other = draw(np.random.default_rng(0))
    found, error = difference(other, one), standard_error(one)
    assert found is not None and error is not None
    assert found.high - found.low < error
    assert found == difference(other, one)
    assert found.loss == pytest.approx((sum(other.losses) - sum(one.losses)) / sum(one.tokens))
    assert found.text() == f"{found.loss:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"


def test_equal_documents_give_the_textbook_error() -> None:
    losses = [1.0, 2.0, 4.0, 5.0] * 3
    expected = np.std(losses, ddof=1) / math.sqrt(12) / 10
    assert standard_error(DocumentLosses(losses, [10] * 12)) == pytest.approx(expected)
    same = DocumentLosses(losses, [10] * 12)
    found = difference(same, same)
    assert found is not None and (found.low, found.loss, found.high) == (0, 0, 0)
    assert not found.is_sure


def test_too_few_or_other_documents_have_no_interval() -> None:
    few = DocumentLosses([1.0] * (FEWEST - 1), [3] * (FEWEST - 1))
    one, other = draw(np.random.default_rng(1))
    assert standard_error(few) is None and difference(few, few) is None
    assert difference(one, None) is None
    moved = DocumentLosses(one.losses, [*one.tokens[1:], one.tokens[0]])
    assert difference(one, moved) is None
    records = {"a": {"documents": one.record()}, "b": {}, "c": {"documents": other.record()}}
    assert [(first, name) for first, name, _ in differences(records)] == [("a", "c")]


def test_many_documents_are_joined_in_order() -> None:
    tokens = np.arange(2500) % 3
    losses = tokens * 0.5
    found = joined(losses, tokens)
    assert len(found.tokens) == MOST_BLOCKS
    assert sum(found.tokens) == tokens.sum() and sum(found.losses) == losses.sum()
    assert joined(np.array([1.5, 0.0, 2.5]), np.array([3, 0, 5])) == DocumentLosses(
        [1.5, 2.5], [3, 5]
    )


def test_losses_of_a_strangers_record_are_checked() -> None:
    for documents in ({"losses": [1.0], "tokens": []}, {"losses": [math.nan], "tokens": [1]}):
        with pytest.raises(ValueError, match="two lists of as many finite numbers"):
            read_losses({"documents": documents})


def test_what_is_won_back_is_a_share_of_the_gap_to_the_control() -> None:
    control, _ = draw(np.random.default_rng(2))
    tokens = np.array(control.tokens)
    noise = np.random.default_rng(5).normal(0, 0.002, (2, 60))
    pruned, recovered = (
        DocumentLosses((np.array(control.losses) + tokens * (gap + more)).tolist(), control.tokens)
        for gap, more in zip((0.1, 0.025), noise, strict=True)
    )
    found = won_back(pruned, recovered, control)
    assert found is not None
    share, low, high = found
    assert share == pytest.approx(0.75, abs=0.02) and low < share < high and high - low < 0.05
    assert won_back(control, recovered, pruned) is None
    assert won_back(pruned, recovered, pruned) is None
