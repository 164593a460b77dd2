"""The stage `prune`: the three in one, what it refuses, and training on from its output."""

import json
import os
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from flame.checkpoint.dcp_source import DcpSource
from flame.checkpoint.reference import resolve
from flame.checkpoint.steps import verify_step
from flame.errors import UserError
from pruning.adapters import ADAPTERS
from pruning.planning.plan_file import read_plan
from pruning.transform.sliced_source import SlicedSource
from pruning.transform.write import slices_of
from tests.distributed import run_distributed
from tests.pruning.families import tiny_config
from tests.pruning.models import (
    DELTA_NET,
    GATED_DELTANET,
    tensors_in,
    weights,
    write_hf,
    write_run,
    write_text,
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text, its tokenizer, and a Hugging Face model without one."""
    folder = tmp_path_factory.mktemp("prune")
    write_text(folder)
    write_hf(folder / "model", GATED_DELTANET, weights(GATED_DELTANET))
    return folder


def stage(name: str, *arguments: object) -> None:
    """Run a command line of `pruning.<name>` as one of the processes of its job."""
    from flame.process.distributed import world_size

    module = import_module(f"pruning.{name}")
    options = module.STAGE.parse([str(argument) for argument in arguments])
    module.check(options, world_size())
    module.run(options)


def data_of(home: Path) -> list[object]:
    text = ["--data", home / "text.jsonl", "--tokenizer", home / "tokenizer"]
    return [*text, "--sequences", 3, "--seq-len", 64]


def test_prune_is_calibrate_plan_and_apply(home: Path, tmp_path: Path) -> None:
    method = ["--method", "drrqr", "--ratio", "0.5", "--f", "1.2"]
    run_distributed(stage, 2, "prune", home / "model", tmp_path / "one", *method, *data_of(home))
    stage("calibrate", home / "model", tmp_path / "stats", *data_of(home))
    stats = ["--stats", tmp_path / "stats"]
    stage("plan", home / "model", tmp_path / "plan.json", *method, *stats)
    stage("apply", home / "model", tmp_path / "plan.json", tmp_path / "two")
    stage("prune", home / "model", tmp_path / "three", *method, *stats)
    plan = (tmp_path / "plan.json").read_bytes()
    one = tensors_in(resolve(tmp_path / "one").source())
    for out in ("one", "two", "three"):
        assert (tmp_path / out / "plan.json").read_bytes() == plan
        other = tensors_in(resolve(tmp_path / out).source())
        assert all(torch.equal(other[name], one[name]) for name in one)
    assert read_plan(tmp_path / "plan.json").options["f"] == 1.2
    with pytest.raises(UserError, match="--data is for a calibration, which --stats .*stats stand"):
        stage("prune", home / "model", tmp_path / "four", *method, *stats, *data_of(home))
    with pytest.raises(UserError, match="--pad has nothing to fill up: leave it out"):
        stage("apply", home / "model", tmp_path / "plan.json", tmp_path / "four", "--pad")
    assert sorted(os.listdir(tmp_path)) == ["one", "plan.json", "stats", "three", "two"]


def late_check(*arguments: object) -> None:
    """A stage whose rank 1 is slow to check."""
    from flame.process.distributed import rank

    if rank() == 1:
        time.sleep(1)
    stage("plan", *arguments)


def test_a_rank_that_is_slow_to_check_does_not_meet_the_output(home: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    run_distributed(late_check, 2, home / "model", plan, "--method", "l1", "--ratio", "0.5")
    assert read_plan(plan).method == "l1"


def test_a_method_without_needs_reads_no_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError("data was asked for")

    monkeypatch.setattr("pruning.prune.calibration_data", refuse)
    model = write_run(tmp_path / "model", DELTA_NET, weights(DELTA_NET))
    stage("prune", model, tmp_path / "out", "--method", "random", "--ratio", "0.5", "--seed", "7")
    plan = read_plan(tmp_path / "out" / "plan.json")
    assert (plan.calibration, plan.options) == (None, {"seed": 7})
    assert resolve(tmp_path / "out").kind == "dcp"


@pytest.mark.parametrize(
    ("flags", "width"),
    [
        (["--ratio", "0.5"], 16),
        (["--ratio", "0.1"], 28),
        (["--ratio", "0.25"], 24),
        (["--ratio", "0.3"], 20),
        (["--ratio", "0.3", "--paper"], 22),
        (["--ratio", "0.3", "--multiple-of", "16"], 16),
        (["--ratio", "0.9"], 4),
    ],
)
def test_widths_follow_ratio_and_multiple(flags: list[str], width: int, tmp_path: Path) -> None:
    model = write_hf(tmp_path / "model", DELTA_NET, weights(DELTA_NET))
    stage("plan", model, tmp_path / "plan.json", "--method", "l1", *flags)
    plan = read_plan(tmp_path / "plan.json")
    assert set(plan.widths.values()) == {(width, width)}
    said = [note for note in plan.notes if "which removes" in note]
    assert bool(said) == (width in (16, 20, 4) and flags[1] != "0.5")


def refused(home: Path, out: Path, *flags: object, model: str = "model") -> str:
    """What `prune` says instead of writing `out`; later flags override earlier ones."""
    before = sorted(path.name for path in out.parent.iterdir())
    defaults = ["--method", "drrqr", "--ratio", "0.5", *data_of(home)]
    with pytest.raises(UserError) as error:
        stage("prune", home / model, out, *defaults, *flags)
    assert sorted(path.name for path in out.parent.iterdir()) == before
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ratio", "0"], "ratio 0.0 is not between 0 and 1"),
        (["--ratio", "1"], "ratio 1.0 is not between 0 and 1"),
        (["--ratio", "-1"], "ratio -1.0 is not between 0 and 1"),
        (["--ratio", "nan"], "ratio nan is not between 0 and 1"),
        (["--ratio", "half"], "ratio 'half' is not a number"),
        (["--ratio", "0.01", "--multiple-of", "32"], "is no reduction"),
        (["--multiple-of", "0"], "--multiple-of: 0 is not a whole number of at least 1"),
        (["--paper", "--multiple-of", "8"], "--paper means --multiple-of 1, not 8"),
        (["--method", "best"], "unknown method 'best': choose from drrqr"),
        (["--method", "l1", "--f", "2"], "--f is no option of l1: it has none"),
        (["--f", "x"], "--f: x is not a number"),
        (["--f", "1"], "method drrqr: f is 1.0"),
        (["--f", "inf"], "method drrqr: f is inf"),
        (["--seed", "9" * 20], f"--seed: {'9' * 20} is not a whole number from 0 to {2**63 - 1}"),
        (["--max-swaps", "-1"], "method drrqr: max_swaps is -1"),
        (["--space", "state"], "unknown kind of space 'state': choose from key, value, head"),
        (["--space", "key,key"], "--space key,key names a kind twice"),
        (["--space", "value"], "drrqr does not choose among spaces of kind 'value', only key: for"),
        (["--space", "key,head"], "does not choose among spaces of kind 'head', only key"),
        (["--ratio", "key=0.5,head=0.5"], "head=0.5 is for a kind that is not pruned: --space is"),
        (["--ratio", "key=0.5,rank=0.5"], "'rank=0.5' of 'key=0.5,rank=0.5' is for no kind of"),
        (["--ratio", "key=2"], "ratio 2.0 is not between 0 and 1"),
        (["--width", "16"], "give exactly one of --ratio, --width and --state-bytes"),
        (["--state-bytes", "4096"], "give exactly one of --ratio, --width and --state-bytes"),
        (["--state-bytes", "0"], "--state-bytes: 0 is not a whole number of at least 1"),
        (["--allocate", "heads"], "--allocate: unknown 'heads': choose from uniform"),
        (
            ["--method", "jrnp"],
            "jrnp does not choose among spaces of kind 'key', only head: for key",
        ),
        (["--pad"], "--pad is for heads of different widths, which --allocate layer, model"),
        (
            ["--floor", "8"],
            "--floor is for heads of different widths, which --allocate layer, model",
        ),
        (["--to", "gguf"], "--to: unknown 'gguf': choose from hf, dcp"),
        (["--sequences", "100000"], "100000"),
        (["--unknown"], "unrecognized arguments: --unknown"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    flags: list[str], message: str, home: Path, tmp_path: Path
) -> None:
    assert message in refused(home, tmp_path / "out", *flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give exactly one of --ratio, --width and --state-bytes"),
        (["--width", "32"], "--width key=32 is no reduction: a model with 32 key channels"),
        (["--width", "64"], "--width key=64 is out of range: a model with 32 key channels can"),
        (["--width", "18"], "--width key=18 is not a multiple of 4: take 16 or 20, or --mult"),
        (["--width", "many"], "width 'many' is not a whole number"),
        (["--width", "value=16"], "--width value=16 is for a kind that is not pruned"),
        (["--state-bytes", "24576"], "the state takes 24576 already, nothing to prune"),
        (["--state-bytes", "9" * 20], "the state takes 24576 already, nothing to prune"),
        (["--state-bytes", "3071"], "4 of 32 key channels, the fewest in multiples of 4, take"),
        (["--width", "1", "--space", "head", "--allocate", "layer"], "use --allocate model"),
        (
            ["--width", "1", "--space", "value-head", "--allocate", "model"],
            "every key head of a model serves as many value heads",
        ),
        (["--width", "2", "--space", "value-head"], "a model with 2 value heads a group can keep"),
        (
            ["--ratio", "0.5", "--stats", "nowhere"],
            "l1 reads no statistics: leave --stats nowhere out",
        ),
    ],
)
def test_budgets_that_make_no_sense_are_refused(
    flags: list[str], message: str, home: Path, tmp_path: Path
) -> None:
    for name, out in (("prune", tmp_path / "out"), ("plan", tmp_path / "plan.json")):
        with pytest.raises(UserError) as error:
            stage(name, home / "model", out, "--method", "l1", *flags)
        assert message in str(error.value) and "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_ratio_of_heads_shared_over_the_model_counts_on_those_of_all_layers(
    home: Path, tmp_path: Path
) -> None:
    words = ["--method", "random", "--space", "head", "--ratio", "0.2", "--allocate", "model"]
    stage("plan", home / "model", tmp_path / "plan.json", *words)
    kept = read_plan(tmp_path / "plan.json").kept
    heads = tiny_config("gated_deltanet")["num_heads"] * len(kept)
    assert sum(len(rows[0]) for rows in kept.values()) == int(heads * 0.8)


def test_sharing_needs_scores_and_a_class(home: Path, tmp_path: Path) -> None:
    share = ["--ratio", "0.5", "--paper", "--allocate", "model"]
    with pytest.raises(UserError, match="shares channels by scores, which drrqr has none of: use"):
        stage("plan", home / "model", tmp_path / "p", "--method", "drrqr", *share)
    kda = tiny_config("kda")
    write_hf(tmp_path / "kda", kda, weights(kda))
    with pytest.raises(UserError, match="pca mixes key channels, and .*f_proj.1.weight acts on"):
        stage("plan", tmp_path / "kda", tmp_path / "p", "--method", "pca", *share[:3])
    with pytest.raises(UserError, match="and kda has no class for that: add --pad"):
        stage("plan", tmp_path / "kda", tmp_path / "p", "--method", "l1", *share)
    share += ["--pad"]
    stage("prune", tmp_path / "kda", tmp_path / "out", "--method", "l1", *share)
    plan = read_plan(tmp_path / "out" / "plan.json")
    assert plan.pad and plan.config_after["model_type"] == "kda"
    assert len({width for row in plan.widths.values() for width in row}) > 1


def test_the_total_of_a_shared_budget_is_that_of_the_uniform_one(
    home: Path, tmp_path: Path
) -> None:
    """In state bytes; and a plan that is padded later is the plan that was padded at once."""
    flags = ["--method", "random", "--seed", "44", "--ratio", "0.5", "--multiple-of", "2"]
    sizes = set()
    for allocate in ("uniform", "layer", "model"):
        plan = tmp_path / f"{allocate}.json"
        stage("plan", home / "model", plan, *flags, "--allocate", allocate)
        stage("apply", home / "model", plan, tmp_path / allocate)
        config = resolve(tmp_path / allocate).config
        sizes.add(ADAPTERS[config["model_type"]].state_bytes(config))
        budget = json.loads(plan.read_text())["budget"]
        assert budget.get("allocate", "uniform") == allocate
        widths = {width for row in read_plan(plan).widths.values() for width in row}
        assert (len(widths) > 1) == (allocate != "uniform")
    assert sizes == {24576 // 2}
    stage("apply", home / "model", tmp_path / "model.json", tmp_path / "later", "--pad")
    stage("prune", home / "model", tmp_path / "once", *flags, "--allocate", "model", "--pad")
    later, once = (tensors_in(resolve(tmp_path / n).source()) for n in ("later", "once"))
    assert resolve(tmp_path / "once").config["model_type"] == "gated_deltanet"
    assert later.keys() == once.keys()
    assert all(torch.equal(later[name], once[name]) for name in once)
    for name in ("later", "once"):
        assert json.loads((tmp_path / name / "plan.json").read_text())["pad"] is True


def test_channels_are_shared_out_among_the_heads_that_stay(home: Path, tmp_path: Path) -> None:
    kinds = ["--space", "key,head", "--ratio", "0.5", "--allocate", "model", "--paper"]
    stage("plan", home / "model", tmp_path / "plan.json", "--method", "l1", *kinds)
    plan = read_plan(tmp_path / "plan.json")
    total = heads = 0
    for layer in (0, 1):
        for head in plan.kept[f"layers.{layer}.head"][0].tolist():
            total += plan.widths[f"layers.{layer}.key"][head]
            heads += 1
    assert (heads, total) == (2, 2 * 16)


def test_several_kinds_by_widths_of_their_own(home: Path, tmp_path: Path) -> None:
    widths = ["--space", "head,value,key", "--width", "key=16,value=8,head=1"]
    flags = ["--method", "l1", "--multiple-of", "8", *widths]
    stage("prune", home / "model", tmp_path / "out", *flags)
    config = resolve(tmp_path / "out").config
    assert (config["head_dim"], config["num_heads"], config["num_v_heads"]) == (16, 1, 2)
    assert int(config["head_dim"] * config["expand_v"]) == 8
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert plan["budget"]["width"] == "key=16,value=8,head=1"
    assert plan["budget"]["space"] == "key,value,head"


def test_projected_tensors_travel_beside_the_plan(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By plan and apply as by prune; the screen and the plan say that they are an approximation."""
    method = ["--method", "pca", "--ratio", "0.5"]
    stage("calibrate", home / "model", tmp_path / "stats", "--methods", "pca", *data_of(home))
    stats = ["--stats", tmp_path / "stats"]
    plan = tmp_path / "plan.json"
    stage("plan", home / "model", plan, *method, *stats)
    tensors = tmp_path / "plan.tensors.safetensors"
    assert "note: pca: the projection is an approximation" in capsys.readouterr().out
    assert [note for note in read_plan(plan).notes if "approximation" in note]
    stage("apply", home / "model", plan, tmp_path / "two")
    assert "note: pca: the projection is an approximation" in capsys.readouterr().out
    stage("prune", home / "model", tmp_path / "one", *method, *stats)
    one, two = (tensors_in(resolve(tmp_path / name).source()) for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    for name in ("one", "two"):
        assert (tmp_path / name / "plan.json").read_bytes() == plan.read_bytes()
        assert (tmp_path / name / tensors.name).read_bytes() == tensors.read_bytes()
    with pytest.raises(UserError, match="plan.json exists"):
        stage("plan", home / "model", plan, *method, *stats)
    plan.unlink()
    with pytest.raises(UserError, match="plan.tensors.safetensors exists"):
        stage("plan", home / "model", plan, *method, *stats)
    stage("plan", home / "model", plan, *method, *stats, "--overwrite")
    with pytest.raises(UserError, match="has tensors of its own, which --pad cannot fill up"):
        stage("apply", home / "model", plan, tmp_path / "padded", "--pad")
    assert not (tmp_path / "padded").exists()
    tensors.unlink()
    with pytest.raises(UserError, match="plan.tensors.safetensors, which is missing"):
        stage("apply", home / "model", plan, tmp_path / "three")


def test_models_that_cannot_be_pruned_are_refused(home: Path, tmp_path: Path) -> None:
    def configured(name: str, config: Any) -> str:
        folder = home / name
        folder.mkdir()
        text = config if isinstance(config, str) else json.dumps(config)
        (folder / "config.json").write_text(text)
        (folder / "model.safetensors").write_bytes((home / "model/model.safetensors").read_bytes())
        return refused(home, tmp_path / "out", model=name)

    assert "no such folder" in refused(home, tmp_path / "out", model="nothing")
    (home / "empty").mkdir()
    assert "has no config.json" in refused(home, tmp_path / "out", model="empty")
    assert "is not JSON" in configured("broken", "{")
    assert "no adapter for model family 'llama'" in configured("llama", {"model_type": "llama"})
    assert "is both its key and its value width" in configured("tied", {"model_type": "rwkv7"})


def test_outputs_that_must_not_be_written_are_refused(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").touch()
    assert "exists: choose another, or pass --overwrite" in refused(home, out)
    assert (out / "precious").exists()
    assert "lies inside the model's folder" in refused(home, home / "model" / "out")
    read_only = tmp_path / "locked"
    read_only.mkdir(mode=0o555)
    assert "is read-only for this user" in refused(home, read_only / "out")
    words = ["prune", home / "model", out, "--method", "l1", "--ratio", "0.5", "--overwrite"]
    with pytest.raises(UserError, match="was not made by slimstate"):
        stage(*words)
    (out / "precious").unlink()
    stage(*words)
    assert resolve(out).config["head_dim"] == 16


def test_weights_that_are_not_finite_are_refused(home: Path, tmp_path: Path) -> None:
    tensors = weights(GATED_DELTANET)
    for name in ("lm_head.weight", "model.layers.1.attn.q_proj.weight"):
        tensors[name].view(-1)[7] = float("nan")
        write_hf(home / name, GATED_DELTANET, tensors)
        for method in ("drrqr", "l1"):
            text = refused(home, tmp_path / "out", "--method", method, model=name)
            assert f"{name} holds" in text
        tensors[name].view(-1)[7] = 0.0


def test_plans_of_other_models_are_refused(home: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    stage("plan", home / "model", plan, "--method", "l1", "--ratio", "0.5")
    write_hf(home / "sibling", GATED_DELTANET, weights(GATED_DELTANET, seed=1))
    with pytest.raises(UserError, match=r"plan .*plan.json is of another model \(fingerprint"):
        stage("apply", home / "sibling", plan, tmp_path / "out")
    content = json.loads(plan.read_text())
    content["spaces"]["layers.0.key"][0][0] = 99
    plan.write_text(json.dumps(content))
    with pytest.raises(UserError, match="comes after 99"):
        stage("apply", home / "model", plan, tmp_path / "out")
    with pytest.raises(UserError, match="plan.json exists"):
        stage("plan", home / "model", plan, "--method", "l1", "--ratio", "0.5")
    with pytest.raises(UserError, match="drrqr chooses by statistics: make them with"):
        stage("plan", home / "model", tmp_path / "p", "--method", "drrqr", "--ratio", "0.5")
    assert os.listdir(tmp_path) == ["plan.json"]


def train(*arguments: str) -> None:
    from flame.train import STAGE, check, run

    options = STAGE.parse(list(arguments))
    check(options, 2)
    run(options)


def write_recipe(home: Path, out: Path) -> Path:
    recipe = home / "recipe.toml"
    recipe.write_text(
        f"""
[job]
dump_folder = "{out}"
[model]
config = "{home / "model" / "config.json"}"
[data]
dataset = "{home / "text.jsonl"}"
tokenizer = "{home / "tokenizer"}"
virtual_shards = 4
[training]
seq_len = 64
local_batch_size = 2
global_batch_size = 4
steps = 3
[optimizer]
lr = 1e-3
[lr_scheduler]
warmup_steps = 1
total_steps = 10
[checkpoint]
interval = 10
"""
    )
    return recipe


def test_a_pruned_run_trains_on_from_where_it_stood(home: Path, tmp_path: Path) -> None:
    """Trained, pruned and trained on by two processes, with no data named but in the recipe."""
    dense, out = tmp_path / "dense", tmp_path / "out"
    run_distributed(train, 2, "--config", str(write_recipe(home, dense)))
    method = ["--method", "drrqr", "--ratio", "0.5", "--sequences", 5]
    run_distributed(stage, 2, "prune", dense, out, *method)
    plan = read_plan(out / "plan.json")
    assert plan.calibration is not None
    assert (plan.calibration["seq_len"], plan.calibration["tokens"]) == (64, 320)
    assert plan.calibration["data"]["dataset"] == str(home / "text.jsonl")
    recipe = str(out / "recipe.toml")
    run_distributed(train, 2, "--config", recipe, "--training.steps", "4")
    step = out / "checkpoint" / "step-4"
    verify_step(step)
    before = DcpSource(dense / "checkpoint" / "step-3", everything=True)
    sliced = SlicedSource(before, slices_of(plan, resolve(dense).config))
    after = DcpSource(step, everything=True)
    assert after.names() == sliced.names()
    second_moments = [name for name in after.names() if name.endswith(".exp_avg_sq")]
    assert len(second_moments) > 20
    for name in second_moments:
        # v' = b v + (1 - b) g^2 with b = 0.95 is at least b v, if v was loaded.
        assert bool((after.read(name) >= 0.9499 * sliced.read(name)).all()), name
    counters = [name for name in after.names() if name.endswith(".step")]
    assert all(float(after.read(name)) == 4 for name in counters)
    for run, number, sequences in ((dense, 3, 12), (out, 4, 16)):
        state = json.loads((run / f"checkpoint/step-{number}/dataloader.json").read_text())
        assert state["next_sequence"] == sequences
