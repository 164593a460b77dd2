"""`--estimate`: counts against counted operations, rates from the command line, what is summed."""

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from flame.errors import UserError
from pruning import prune
from pruning.cost.counts import Counts
from pruning.cost.work import Work, rates_of
from pruning.methods import METHODS
from pruning.plan import needed
from pruning.planning.budgets import Budget
from pruning.statistics import HeadOutputErrors, KeyOutputErrors, ValueOutputErrors
from tests.pruning import hybrids
from tests.pruning.families import CONFIGS, build, tokens

RATES = "400e12,50e12,50e12,2e12"


def test_products_of_a_forward_pass_are_those_that_torch_counts() -> None:
    config, length = CONFIGS["gated_deltanet"], 64
    model = build(config)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(tokens(1, length), use_cache=False, logits_to_keep=1)
    of_kind = counter.get_flop_counts()["Global"]
    # The delta rule's are batched, and counted apart.
    counted = sum(of_kind.get(op, 0) for op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    logits = 2 * config["hidden_size"] * config["vocab_size"]
    found = length * Counts(config, 4).forward(length).products
    assert found == pytest.approx(counted - logits, rel=0.02)


def test_only_routed_experts_that_a_token_meets_count() -> None:
    config = hybrids.CONFIGS["qwen3_5_moe_text"]
    one = Counts({**config, "num_experts_per_tok": 1}, 4).forward(64)
    two = Counts({**config, "num_experts_per_tok": 2}, 4).forward(64)
    expert = 3 * config["hidden_size"] * config["moe_intermediate_size"]
    layers = config["num_hidden_layers"]
    assert two.products - one.products == pytest.approx(2 * expert * layers)


def test_the_table_is_made_from_the_config_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "dense.json"
    file.write_text(json.dumps(CONFIGS["gated_deltanet"]))
    words = [str(file), "out", "--ratio", "0.5", "--estimate", "--rates", RATES]
    prune.STAGE.main([*words, "--space", "key"])
    said = capsys.readouterr().out
    rows = {line[:44].strip(): line[44:].split() for line in said.splitlines()[4:]}
    assert float(rows["drrqr"][1]) == 1
    assert "output-error of key channels" in rows and "output-error of heads" not in rows
    both = float(rows["output-error and repair output"][1])
    parts = (rows["output-error of key channels"][1], rows["repair output"][1])
    assert both == pytest.approx(sum(map(float, parts)), abs=0.02)
    assert not (tmp_path / "out").exists()


def test_work_takes_as_long_as_its_rates_say() -> None:
    work = 2 * (Work(1, 2, 3, 4) + Work(moved=4))
    assert work.seconds(rates_of(("1", "2", "3", "8"))) == 2 + 2 + 2 + 2
    for words in (("1", "2", "3"), ("1", "2", "3", "0"), ("1", "2", "3", "x")):
        with pytest.raises(UserError, match="four numbers a second"):
            rates_of(words)


def test_a_plan_needs_the_errors_of_its_own_kinds_of_channels() -> None:
    config, method = CONFIGS["gated_deltanet"], METHODS["output-error"]()
    wanted = {"key": KeyOutputErrors, "value": ValueOutputErrors, "head": HeadOutputErrors}
    for space, kind in wanted.items():
        assert needed(method, Budget(ratio=0.5, space=space), config) == (kind,)
