"""Plans: the same text for the same plan, and a person's edits found out."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from flame.errors import UserError
from pruning.adapters import adapter_for
from pruning.planning.plan import Plan, check_fingerprint, check_plan
from pruning.planning.plan_file import plan_text, read_plan
from tests.pruning.models import DELTA_NET, GATED_DELTANET

MARK = "ab" * 32


def make_plan(config: dict[str, Any] = GATED_DELTANET, k: int = 16) -> Plan:
    spaces = [space for space in adapter_for(config).spaces(config) if space.kind == "key"]
    row = torch.arange(k) * 2
    return Plan(
        method="drrqr",
        options={"max_swaps": None, "f": 1.5},
        budget={"ratio": 0.5, "multiple_of": 16, "space": "key"},
        fingerprint=MARK,
        config_before=config,
        config_after=adapter_for(config).resize(
            config, {s.name: (k,) * s.num_heads for s in spaces}
        ),
        kept={space.name: (row,) * space.num_heads for space in spaces},
        calibration={"sequences": 2, "tokens": 128},
        versions={"torch": "2"},
    )


def test_text_is_sorted_with_a_space_a_line(tmp_path: Path) -> None:
    text = plan_text(make_plan())
    content = json.loads(text)
    assert list(content) == sorted(content)
    assert list(content["method"]["options"]) == ["f", "max_swaps"]
    lines = [line for line in text.splitlines() if '"layers.' in line]
    assert len(lines) == 2
    assert all(line.count("[[") == 1 for line in lines)
    (tmp_path / "plan.json").write_text(text)
    assert plan_text(read_plan(tmp_path / "plan.json")) == text


def test_reading_gives_the_plan_back(tmp_path: Path) -> None:
    plan = make_plan()
    file = tmp_path / "plan.json"
    file.write_text(plan_text(plan))
    read = read_plan(file)
    for name, kept in plan.kept.items():
        assert all(map(torch.equal, read.kept[name], kept))
    assert (read.method, read.options, read.widths) == ("drrqr", plan.options, plan.widths)
    check_plan(read, GATED_DELTANET)
    check_fingerprint(read, MARK)


def edited(tmp_path: Path, edit: Any) -> Path:
    """The file of a plan after `edit` changed its content."""
    content = json.loads(plan_text(make_plan()))
    edit(content)
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(content))
    return file


def set_channel(value: Any) -> Any:
    def edit(content: dict[str, Any]) -> None:
        content["spaces"]["layers.1.key"][1][3] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (set_channel(8), "layers.1.key, head 1: channel 8 occurs twice"),
        (set_channel(9), "layers.1.key, head 1: channel 8 comes after 9: list them in order"),
        (set_channel(-1), "layers.1.key, head 1: -1 is not a channel's number"),
        (set_channel(6.0), "6.0 is not a channel's number"),
        (set_channel(True), "True is not a channel's number"),
        (set_channel("6"), "'6' is not a channel's number"),
        (lambda c: c["spaces"]["layers.1.key"][1].clear(), "head 1 keeps no channel"),
        (lambda c: c["spaces"].update({"layers.0.key": 3}), "expected one list of channels"),
        (lambda c: c.update(format=2), "its format is 2, this slimstate reads up to 1: install a"),
        (lambda c: c.update(format="1"), "format is '1', expected 1"),
        (lambda c: c.pop("format"), "format is None, expected 1"),
        (lambda c: c.pop("spaces"), "not a plan: it has no spaces"),
        (lambda c: c.pop("fingerprint"), "fingerprint is missing, expected a text"),
        (lambda c: c.update(method="drrqr"), "method is 'drrqr', expected an object"),
        (lambda c: c.update(notes="exact"), "notes is 'exact', expected a list of sentences"),
        (lambda c: c.update(replaced={"file": "../x", "hash": ""}), "expected the name of a file"),
    ],
)
def test_edits_that_break_a_plan_are_named(tmp_path: Path, edit: Any, message: str) -> None:
    file = edited(tmp_path, edit)
    with pytest.raises(UserError) as error:
        read_plan(file)
    assert message in str(error.value)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


def set_last(value: int) -> Any:
    def edit(content: dict[str, Any]) -> None:
        content["spaces"]["layers.0.key"][0][-1] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (set_last(32), "kept channels 0..32 leave the range 0..31"),
        (lambda c: c["spaces"]["layers.0.key"].pop(), "kept channels of 1 heads, expected 2"),
        (lambda c: c["spaces"].pop("layers.0.key"), "spaces differ: layers.0.key"),
        (
            lambda c: c["spaces"].update({"layers.9.key": c["spaces"].pop("layers.0.key")}),
            "no space 'layers.9.key': it has layers.0.key to layers.1.value-head",
        ),
        (
            lambda c: [row.pop() for row in c["spaces"]["layers.0.key"]],
            "was edited: its config_after",
        ),
        (
            lambda c: c["spaces"]["layers.0.key"][0].pop(),
            "was edited: its config_after",
        ),
        (lambda c: c["config_after"].update(head_dim=24), "was edited: its config_after"),
        (lambda c: c["config_before"].update(num_heads=4), "of another model .num_heads 4 there"),
    ],
)
def test_plans_that_do_not_fit_the_model_are_named(tmp_path: Path, edit: Any, message: str) -> None:
    plan = read_plan(edited(tmp_path, edit))
    with pytest.raises(UserError, match=message):
        check_plan(plan, GATED_DELTANET)


def test_a_plan_of_another_model_is_refused() -> None:
    with pytest.raises(UserError, match="the plan is of another model .*model_type delta_net"):
        check_plan(make_plan(DELTA_NET), GATED_DELTANET)
    with pytest.raises(UserError, match="of another model .fingerprint abababababab, this"):
        check_fingerprint(make_plan(), "cd" * 32)


def test_configs_that_compute_the_same_are_the_same_model() -> None:
    check_plan(make_plan(), {**GATED_DELTANET, "torch_dtype": "bfloat16", "use_cache": False})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "plan.json is not JSON: "),
        (b"\x80\x04", "plan.json is not JSON: "),
        (b"[1]", "plan.json is not a JSON object"),
        (b'{"spaces": {}, "format": NaN}', "NaN is not a number"),
        (b'{"spaces": {}, "spaces": {}}', "'spaces' occurs twice"),
    ],
)
def test_files_that_are_no_plan_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "plan.json"
    file.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_plan(file)
    assert message in str(error.value)


def test_a_missing_plan_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*plan\.json: No such file"):
        read_plan(tmp_path / "plan.json")
