"""`slimstate shrink`: what it makes is what its commands make by hand, wherever it is stopped."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flame.checkpoint.dcp_source import DcpSource
from flame.errors import UserError
from launch import shrink
from tests.distributed import run_distributed
from tests.pruning.models import GATED_DELTANET, tensors_in, weights, write_hf, write_text

RECIPE = """
[data]
dataset = "{root}/text.jsonl"
tokenizer = "{root}/tokenizer"
virtual_shards = 4

[training]
seq_len = 32
local_batch_size = 1
global_batch_size = 4
steps = 6

[lr_scheduler]
warmup_steps = 1
decay_type = "cosine"

[checkpoint]
interval = 1
keep_latest_k = 0

[metrics]
enable_tensorboard = false
"""

CHOICE = ["--method", "l1", "--repair", "output", "--sequences", "3"]
SCHEDULE = ["--ratio", "0.5", "--multiple-of", "8", "--at", "0,2,4"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 48 key channels a head, its text, and a recipe to train it with."""
    root = tmp_path_factory.mktemp("shrink")
    write_text(root)
    config = GATED_DELTANET | {"head_dim": 48, "expand_v": 0.5}
    write_hf(root / "dense", config, weights(config))
    (root / "recipe.toml").write_text(RECIPE.format(root=root))
    return root


def words(root: Path, out: Path, *more: str) -> list[str]:
    start = ["--config", str(root / "recipe.toml"), "--init", str(root / "dense")]
    return [str(out), *start, *CHOICE, *(more or SCHEDULE)]


def run_alone(command: str, arguments: list[str]) -> None:
    """A command in a process of the tests' pool, as torchrun would start it."""
    from importlib import import_module

    import torch.distributed as dist

    from launch.cli import COMMANDS

    dist.destroy_process_group()
    stage = import_module(COMMANDS[command].module).STAGE
    options = stage.parse(arguments)
    stage.check(options, int(os.environ["WORLD_SIZE"]))
    stage.run(options)


def everything_in(run: Path, step: int) -> dict[str, Tensor]:
    """Weights and moments of a run's step."""
    return tensors_in(DcpSource(run / "checkpoint" / f"step-{step}", everything=True))


def by_hand(root: Path, out: Path) -> Path:
    """The last phase, made by the commands that a user would type."""

    def prune(model: Path, into: Path, width: int) -> None:
        recipe = ["--recipe", str(root / "recipe.toml")]
        budget = [*recipe, "--width", str(width), "--multiple-of", "8"]
        run_distributed(run_alone, 1, "prune", [str(model), str(into), *CHOICE, *budget])

    def train(run: Path, steps: int, *start: str) -> None:
        what = ["--training.steps", str(steps), "--lr_scheduler.total_steps", "6", *start]
        where = ["--job.dump_folder", str(run)]
        recipe = ["--config", str(root / "recipe.toml")]
        run_distributed(run_alone, 1, "train", [*recipe, *what, *where])

    prune(root / "dense", out / "start", 40)
    train(out / "one", 2, "--init", str(out / "start"))
    prune(out / "one", out / "two", 32)
    train(out / "two", 4, "--model.config", str(out / "two" / "config.json"))
    prune(out / "two", out / "three", 24)
    train(out / "three", 6, "--model.config", str(out / "three" / "config.json"))
    return out / "three"


def test_it_is_the_chain_of_commands_and_goes_on_at_another_size(
    root: Path, tmp_path: Path
) -> None:
    whole = tmp_path / "whole"
    run_distributed(run_alone, 1, "shrink", words(root, whole))
    config = json.loads((whole / "phase-3" / "config.json").read_text())
    assert config["head_dim"] == 24
    found, expected = everything_in(whole / "phase-3", 6), everything_in(by_hand(root, tmp_path), 6)
    assert found.keys() == expected.keys()
    assert any(name.endswith(".exp_avg_sq") for name in found)
    assert all(torch.equal(found[name], expected[name]) for name in expected)

    # Channels that stay bring their moments along.
    name = "optimizer.state.model.layers.0.attn.q_proj.weight.exp_avg"
    before = everything_in(whole / "phase-1", 2)[name]
    after = everything_in(whole / "phase-2", 2)[name]
    kept = json.loads((whole / "phase-2" / "plan.json").read_text())["spaces"]["layers.0.key"]
    rows = [40 * head + channel for head, channels in enumerate(kept) for channel in channels]
    assert torch.equal(after, before[rows])

    # As a kill leaves it in the middle of the second phase; then on two processes.
    stopped = tmp_path / "stopped"
    shutil.copytree(whole, stopped)
    shutil.rmtree(stopped / "phase-3")
    shutil.rmtree(stopped / "phase-2" / "checkpoint" / "step-4")
    run_distributed(run_alone, 2, "shrink", words(root, stopped))
    again = everything_in(stopped / "phase-3", 6)
    differences = {name: _difference(again[name], found[name]) for name in found}
    assert max(differences.values()) < 1e-3, max(differences, key=differences.__getitem__)


def _difference(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return (a.double() - b.double()).abs().max().item() if a.is_floating_point() else 0.0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--ratio", "0.5", "--at", "0,6"], "does not reach its target"),
        (
            ["--ratio", "0.5", "--prunings", "6", "--multiple-of", "8"],
            "would remove nothing: 6 prunings are too many",
        ),
        (["--ratio", "0.5", "--lora.rank", "4"], "lora.rank is 4"),
        (["--ratio", "0.5", "--job.dump_folder", "x"], "for each phase to set"),
        (["--ratio", "0.5", "--at", "0,2,4", "--space", "depth"], "unknown kind of space"),
    ],
    ids=["late", "many", "adapters", "folder", "narrow"],
)
def test_what_cannot_work_is_one_line(
    root: Path, tmp_path: Path, more: list[str], message: str
) -> None:
    options = shrink.STAGE.parse(words(root, tmp_path / "out", *more))
    with pytest.raises(UserError, match=message) as error:
        shrink.check(options)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_model_from_scratch_cannot_lose_channels_at_step_0(root: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    shutil.copy(root / "dense" / "config.json", config)
    start = ["--config", str(root / "recipe.toml"), "--model.config", str(config)]
    options = shrink.STAGE.parse([str(tmp_path / "out"), *start, *CHOICE, *SCHEDULE])
    with pytest.raises(UserError, match="this one starts from scratch"):
        shrink.check(options)
