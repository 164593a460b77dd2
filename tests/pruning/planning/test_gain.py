"""The gain of fewer channels: which plans undo it, and what the others say of it."""

import json
from pathlib import Path
from typing import Any

import pytest

from pruning.adapters.gated_deltanet import GatedDeltaNet
from pruning.methods import METHODS
from pruning.planning.budgets import Budget
from pruning.planning.choose import choose
from pruning.planning.plan import Plan, check_plan, with_padding
from pruning.planning.plan_file import plan_text, read_plan
from tests.memory_source import MemorySource
from tests.pruning.models import GATED_DELTANET, weights


def chosen(config: dict[str, Any] = GATED_DELTANET, **budget: Any) -> Plan:
    """A plan for a model of 32 key and 24 value channels and 2 key heads."""
    return choose(config, MemorySource(weights(config)), METHODS["l1"](), Budget(**budget))


def test_a_plan_undoes_it_unless_it_is_as_published(tmp_path: Path) -> None:
    for paper, eps in ((False, 4e-6), (True, None)):
        plan = chosen(width={"key": 16, "value": 12}, space="key,value", multiple_of=1, paper=paper)
        assert (plan.undo_gain, plan.config_after.get("norm_eps")) == (not paper, eps)
        (tmp_path / "plan.json").write_text(plan_text(plan))
        assert read_plan(tmp_path / "plan.json").undo_gain is not paper
        check_plan(read_plan(tmp_path / "plan.json"), GATED_DELTANET)


def test_a_plan_that_does_not_say_is_as_published(tmp_path: Path) -> None:
    """So were those made before plans said it."""
    plan = chosen(width=16, paper=True)
    content = json.loads(plan_text(plan))
    del content["undo_gain"]
    (tmp_path / "plan.json").write_text(json.dumps(content))
    read = read_plan(tmp_path / "plan.json")
    assert not read.undo_gain
    check_plan(read, GATED_DELTANET)


def test_whole_heads_have_none() -> None:
    plan = chosen(width=1, space="head", paper=True)
    assert plan.notes == () and "norm_eps" not in plan.config_after


def test_it_follows_the_width_that_a_padded_model_has() -> None:
    """A head that is filled up has the scale of the widest."""
    budget = {"ratio": 0.5, "allocate": "model", "multiple_of": 1}
    slim = chosen(**budget)
    assert slim.config_after["undo_gain"] is True and "norm_eps" not in slim.config_after
    widest = max(width for row in slim.widths.values() for width in row)
    assert with_padding(slim).config_after["norm_eps"] == pytest.approx(1e-6 * 32 / widest)
    assert chosen(**budget, pad=True).config_after == with_padding(slim).config_after


def test_a_plan_that_leaves_it_says_how_large_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    (key, value) = chosen(
        width={"key": 8, "value": 12}, space="key,value", multiple_of=1, paper=True
    ).notes
    assert key.startswith("removing key channels multiplies the delta rule's outputs by 2.00: ")
    assert value.startswith("removing value channels divides the output norm's outputs by 1.41: ")
    assert "--paper" in key
    monkeypatch.setattr(GatedDeltaNet, "can_undo_gain", False)
    plan = chosen(width=16)
    assert not plan.undo_gain and "norm_eps" not in plan.config_after
    assert "outputs by 1.41: no key of a gated_deltanet config undoes it" in plan.notes[0]
    ragged = chosen(ratio=0.5, allocate="model", multiple_of=1).notes[0]
    assert "outputs by 1." in ragged and " to " in ragged
