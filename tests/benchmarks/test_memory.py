"""What a rank holds in each stage: tensors alive, and resident memory of real processes."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.memory import started
from benchmarks.memory_formulas import Sizes, bounds
from benchmarks.memory_stages import DENSE, MODELS, TOKENS, write_folder, write_text
from benchmarks.simulated_world import rank_of
from flame import convert
from flame.checkpoint.reference import resolve
from flame.checkpoint.streaming import BUFFER
from pruning import apply, plan, prune
from tests.live_bytes import LiveBytes

STREAMING = ("plan, by weights", "plan with the repair", "apply", "convert to dcp", "convert to hf")
DEEP: dict[str, Any] = {**DENSE, "num_hidden_layers": 8}
"""Layers of which all gathered weights, or the shares of two models, are more than the bound."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("memory")
    write_text(folder / "text")
    write_folder(folder / "model", DEEP)
    return folder


@pytest.mark.slow
def test_a_pruning_holds_its_share_of_one_model(home: Path) -> None:
    text = ["--data", str(home / "text" / "text.jsonl")]
    text += ["--tokenizer", str(home / "text" / "tokenizer")]
    text += ["--sequences", "2", "--seq-len", str(TOKENS)]
    words = ["--method", "output-error", "--ratio", "0.5", "--multiple-of", "8"]
    model, out = str(home / "model"), str(home / "out")
    options = prune.STAGE.parse([model, out, *words, "--repair", "output", *text])
    with rank_of(0, 2, 2), LiveBytes() as alive:
        prune.make_plan(options, resolve(model))
    bound = bounds(Sizes(DEEP), 2, TOKENS, width=4)
    both = max(bound["calibrate"], bound["calibrate for the repair"]) - BUFFER
    # Half the numbers of twice the size.
    share = Sizes(DEEP).stored
    assert share < alive.peak < both


def test_stages_of_one_process_hold_what_they_say(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def at(name: str) -> str:
        return str(home / name)

    lines: list[tuple[Callable[[Any], None], Any]] = [
        (convert.run, convert.STAGE.parse([at("model"), at("dcp"), "--to", "dcp"])),
        (plan.run, plan.STAGE.parse([at("model"), at("l1.json"), "--method", "l1", "--width", "8",
                                     "--multiple-of", "8"])),
        (apply.run, apply.STAGE.parse([at("dcp"), at("l1.json"), at("pruned"), "--to", "hf"])),
        (convert.run, convert.STAGE.parse([at("dcp"), at("hf"), "--to", "hf"])),
    ]  # fmt: skip
    for run, options in lines:
        with LiveBytes() as alive:
            run(options)
        said = re.search(r"^rank 0 alone .*: in memory at most (\d+) MiB", capsys.readouterr().out)
        assert said is not None
        # It is rounded to MiB.
        held = (int(said[1]) + 1) * 2**20 - BUFFER
        assert alive.peak < held < Sizes(DEEP).stored, options


@pytest.mark.slow
def test_no_stage_holds_more_than_its_bound(tmp_path: Path) -> None:
    write_text(tmp_path / "text")
    sizes = Sizes(MODELS["dense"])
    bound = bounds(sizes, 2, TOKENS, width=4)
    found = started("dense", 2, tmp_path)
    for stage, (held, _) in found.items():
        assert held < bound[stage], stage
    for stage in STREAMING:
        assert bound[stage] < sizes.stored, stage
