"""The transform: what it slices, what it leaves alone, and that it is whole or not there."""

import json
import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from flame.checkpoint.dcp_source import DcpSource
from flame.checkpoint.reference import resolve
from flame.checkpoint.save import save_step
from flame.checkpoint.steps import verify_step
from flame.errors import UserError
from flame.hugging_face.safetensors_source import SafetensorsSource
from flame.storage.checksums import hash_file
from pruning import apply
from pruning.methods import METHODS
from pruning.planning.choose import Budget, choose
from pruning.planning.plan import Plan, TensorsFile
from pruning.planning.plan_file import plan_text, read_plan
from pruning.transform.sliced_source import SlicedSource
from pruning.transform.write import slices_of, write_pruned
from tests.pruning.models import (
    DELTA_NET,
    FAMILIES,
    GATED_DELTANET,
    tensors_in,
    training_state,
    weights,
    write_hf,
    write_run,
)
from tests.pruning.uneven import uneven_plan

RECIPE = """
[job]
dump_folder = "elsewhere"

[model]
init = "some/model"

[data]
dataset = "python-stdlib"

[training]
seq_len = 64
steps = 10
"""


def plan_for(folder: Path, ratio: float = 0.5) -> Plan:
    reference = resolve(folder)
    return choose(reference.config, reference.source(), METHODS["l1"](), Budget(ratio))


def apply_plan(model: Path, plan: Plan, out: Path, *options: str) -> None:
    file = out.parent / f"{out.name}.json"
    file.write_text(plan_text(plan))
    arguments = apply.STAGE.parse([str(model), str(file), str(out), *options])
    apply.check(arguments)
    apply.run(arguments)


def rows_of(plan: Plan, name: str, head_dim: int) -> Tensor:
    """Positions that survive of the rows of a q or k tensor, head after head."""
    kept = plan.kept[f"layers.{int(re.findall('layers.([0-9]+)', name)[0])}.key"]
    return torch.cat([head * head_dim + row for head, row in enumerate(kept)])


def is_key(name: str) -> bool:
    return any(f".attn.{part}." in name for part in ("q_proj", "k_proj", "q_conv1d", "k_conv1d"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_training_step_is_sliced_with_its_moments_and_nothing_else(
    family: str, tmp_path: Path
) -> None:
    config = FAMILIES[family]
    model = write_run(tmp_path / "model", config, weights(config), recipe=RECIPE)
    plan = plan_for(model)
    apply_plan(model, plan, tmp_path / "out")
    before = DcpSource(model / "checkpoint" / "step-7", everything=True)
    after = DcpSource(tmp_path / "out" / "checkpoint" / "step-7", everything=True)
    assert after.names() == before.names()
    assert after.values() == before.values()
    sliced = 0
    for name in before.names():
        expected = before.read(name)
        if is_key(name) and not name.endswith(".step"):
            expected = expected[rows_of(plan, name, 32)]
            sliced += 1
        assert torch.equal(after.read(name), expected), name
    assert sliced == 2 * 4 * 3


@pytest.mark.parametrize("family", FAMILIES)
def test_moments_are_sliced_like_their_parameters(family: str, tmp_path: Path) -> None:
    """In every dimension that one space or several cut: here moments equal to the parameters."""
    tensors = weights(FAMILIES[family])
    moments = {f"optimizer.state.{name}.exp_avg": tensor for name, tensor in tensors.items()}
    model = write_run(tmp_path / "model", FAMILIES[family], tensors)
    save_step({**tensors, **moments}, model / "checkpoint", 7, alone=True)
    reference = resolve(model)
    width = {"key": 16, "value": 8, "head": 1}
    if family == "gated_deltanet":
        width["value-head"] = 1
    budget = Budget(width=width, multiple_of=8, space=",".join(width))
    plan = choose(reference.config, reference.source(), METHODS["l1"](), budget)
    apply_plan(model, plan, tmp_path / "out")
    after = DcpSource(tmp_path / "out" / "checkpoint" / "step-7", everything=True)
    assert after.info("model.layers.0.attn.q_proj.weight").shape[0] == 16
    for name in tensors:
        moment = after.read(f"optimizer.state.{name}.exp_avg")
        if name.endswith("o_norm.weight"):
            # Of 24 value channels 8 stay, or 8 of 16: the weight is sqrt(3 or 2) times as large.
            squared = {"gated_deltanet": 3, "delta_net": 2}[family]
            torch.testing.assert_close(moment * squared, after.read(name))
            assert float(after.read(name).mean()) == pytest.approx(squared**0.5)
        else:
            assert torch.equal(moment, after.read(name)), name


@pytest.mark.parametrize("undo_gain", [False, True])
def test_padding_scales_a_norm_s_weight_and_its_moments_and_zeroes_the_rest(
    undo_gain: bool, tmp_path: Path
) -> None:
    """w becomes c w, so gradients are divided by c, and their squares by c²."""
    config = FAMILIES["gated_deltanet"]
    model = write_run(tmp_path / "model", config, weights(config))
    plan = uneven_plan(resolve(model), ("value",), pad=True, undo_gain=undo_gain)
    counts = [len(plan.kept[f"layers.{layer}.value"][0]) for layer in (0, 1)]
    apply_plan(model, plan, tmp_path / "out")
    before, after = (
        DcpSource(tmp_path / name / "checkpoint" / "step-7", everything=True)
        for name in ("model", "out")
    )
    less = counts.index(min(counts))
    kept, most = plan.kept[f"layers.{less}.value"][0], max(counts)
    # 24 channels of zeros and others, or those that are kept alone.
    factor = ((24 if undo_gain else len(kept)) / most) ** 0.5
    name = f"model.layers.{less}.attn.o_norm.weight"
    for entry, power in (("", 1), (".exp_avg", -1), (".exp_avg_sq", -2)):
        full = f"optimizer.state.{name}{entry}" if entry else name
        found = after.read(full)
        assert found.shape == (most,)
        assert int((found == 0).sum()) == most - len(kept)
        expected = before.read(full)[kept] * factor**power
        torch.testing.assert_close(found[found != 0], expected)
    for tensor in ("v_proj", "g_proj"):
        moment = f"optimizer.state.model.layers.{less}.attn.{tensor}.weight.exp_avg"
        rows = after.read(moment).view(4, most, -1)
        assert [int((head.abs().sum(1) == 0).sum()) for head in rows] == [most - len(kept)] * 4


def test_what_lies_beside_the_weights_goes_along(tmp_path: Path) -> None:
    model = write_run(tmp_path / "model", DELTA_NET, weights(DELTA_NET), recipe=RECIPE)
    (model / "tokenizer.json").write_text("{}")
    out = tmp_path / "out"
    plan = plan_for(model)
    apply_plan(model, plan, out)
    step = out / "checkpoint" / "step-7"
    verify_step(step)
    assert (step / "dataloader.json").read_bytes() == b'{"next_sequence": 56}'
    assert json.loads((out / "config.json").read_text()) == plan.config_after
    assert (out / "tokenizer.json").read_text() == "{}"
    assert plan_text(read_plan(out / "plan.json")) == plan_text(plan)
    from flame.config import job_from_tables
    from flame.recipe import read_tables

    job = job_from_tables(read_tables(out / "recipe.toml"))
    assert (job.job.dump_folder, job.model.init, job.training.seq_len) == (str(out), "", 64)
    assert job.data.dataset == "python-stdlib"


def test_both_forms_of_a_model_give_one_plan_and_the_same_weights(tmp_path: Path) -> None:
    tensors = weights(GATED_DELTANET)
    config = {key: value for key, value in GATED_DELTANET.items() if key != "architectures"}
    hf = write_hf(tmp_path / "hf", config, tensors)
    run = write_run(tmp_path / "run", config, tensors)
    plan = plan_for(hf)
    assert plan_text(plan_for(run)) == plan_text(plan)
    for model in (hf, run):
        for form in ("hf", "dcp"):
            apply_plan(model, plan, tmp_path / f"{model.name}-{form}", "--to", form)
    first = tensors_in(resolve(tmp_path / "hf-hf").source())
    for name in ("hf-dcp", "run-hf", "run-dcp"):
        other = tensors_in(resolve(tmp_path / name).source())
        assert other.keys() == first.keys()
        assert all(torch.equal(other[key], value) for key, value in first.items()), name
        # Loaders other than transformers' look for the class by name.
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["architectures"] == ["GatedDeltaNetForCausalLM"]
    assert resolve(tmp_path / "hf-dcp").weights.name == "step-0"


class Watched:
    """A source that knows how many of the tensors that it gave are alive."""

    def __init__(self, source: Any) -> None:
        self.source = source
        self.alive: weakref.WeakSet = weakref.WeakSet()
        self.most = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        tensor = self.source.read(name, rows)
        self.alive.add(tensor)
        self.most = max(self.most, len(self.alive))
        return tensor


def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_run(tmp_path / "model", DELTA_NET, weights(DELTA_NET))
    plan = plan_for(model)
    watched = []

    def watch(step: Path, everything: bool, check: Any) -> Watched:
        watched.append(Watched(DcpSource(step, everything, check)))
        return watched[-1]

    monkeypatch.setattr("pruning.transform.model_reader.DcpSource", watch)
    (tmp_path / "out").mkdir()
    write_pruned(plan, resolve(model), tmp_path / "out", "dcp", tmp_path / "out")
    # The one that is being sliced or written, and the last one until its name is bound anew.
    assert 1 <= max(source.most for source in watched) <= 2


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.down_proj.weight", "optimizer.state.lm_head.weight.exp_avg_sq"]
)
def test_tensors_that_are_not_finite_are_named_and_nothing_is_written(
    name: str, value: float, tmp_path: Path
) -> None:
    tensors = weights(DELTA_NET)
    state = {**tensors, **training_state(tensors, 7)}
    state[name] = state[name].clone()
    state[name][-1, -1] = value
    model = write_run(tmp_path / "model", DELTA_NET, tensors)
    save_step(state, model / "checkpoint", 7, alone=True)
    plan = plan_for(model)
    with pytest.raises(UserError, match=f"^{name} holds NaN or infinite values"):
        apply_plan(model, plan, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out.json"]


@pytest.mark.parametrize("to", ["dcp", "hf"])
def test_a_damaged_file_is_named_though_it_is_hashed_while_it_is_read(
    to: str, tmp_path: Path
) -> None:
    model = write_run(tmp_path / "model", DELTA_NET, weights(DELTA_NET))
    plan = plan_for(model)
    shard = model / "checkpoint" / "step-7" / "__0_0.distcp"
    whole = shard.read_bytes()
    for place in (len(whole) // 3, len(whole) // 2, len(whole) - 700):
        damaged = bytearray(whole)
        damaged[place] ^= 0xFF
        shard.write_bytes(damaged)
        with pytest.raises(UserError, match=r"__0_0\.distcp is damaged"):
            apply_plan(model, plan, tmp_path / "out", "--to", to)
        assert not (tmp_path / "out").exists()
    shard.write_bytes(whole)
    apply_plan(model, plan, tmp_path / "out", "--to", to)


def test_replaced_tensors_take_the_place_of_sliced_ones(tmp_path: Path) -> None:
    from dataclasses import replace

    model = write_hf(tmp_path / "model", DELTA_NET, weights(DELTA_NET))
    name = "model.layers.0.attn.q_proj.weight"
    new = torch.rand(2 * 16, 64)
    save_file({name: new}, tmp_path / "new.safetensors")
    mark = hash_file(tmp_path / "new.safetensors")
    plan = replace(plan_for(model), tensors_file=TensorsFile("new.safetensors", mark))
    apply_plan(model, plan, tmp_path / "out")
    assert torch.equal(SafetensorsSource(tmp_path / "out").read(name), new)
    assert hash_file(tmp_path / "out" / "new.safetensors") == mark
    save_file({name: new[1:]}, tmp_path / "new.safetensors")
    with pytest.raises(UserError, match="not the file that the plan was made with"):
        apply_plan(model, plan, tmp_path / "other")
    wrong = replace(
        plan, tensors_file=TensorsFile("new.safetensors", hash_file(tmp_path / "new.safetensors"))
    )
    with pytest.raises(UserError, match=r"by shape \(31, 64\), its channels leave \(32, 64\)"):
        apply_plan(model, wrong, tmp_path / "other")
    (tmp_path / "new.safetensors").unlink()
    with pytest.raises(UserError, match="new.safetensors, which is missing"):
        apply_plan(model, plan, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_moments_of_replaced_tensors_begin_anew(tmp_path: Path) -> None:
    """They are of other channels: the optimizer forgets them and counts its steps from zero."""
    from dataclasses import replace

    model = write_run(tmp_path / "model", DELTA_NET, weights(DELTA_NET))
    name = "model.layers.0.attn.q_proj.weight"
    new = torch.rand(2 * 16, 64)
    (tmp_path / "out").mkdir()
    plan = replace(plan_for(model), new_tensors={name: new.double()})
    write_pruned(plan, resolve(model), tmp_path / "out", "dcp", tmp_path / "out")
    after = DcpSource(tmp_path / "out" / "checkpoint" / "step-7", everything=True)
    assert torch.equal(after.read(name), new)
    for entry in ("exp_avg", "exp_avg_sq", "step"):
        assert not after.read(f"optimizer.state.{name}.{entry}").any()
        other = f"optimizer.state.model.layers.1.attn.q_proj.weight.{entry}"
        assert after.read(other).any()
    written = read_plan(tmp_path / "out" / "plan.json")
    assert written.tensors_file is not None
    tensors = tmp_path / "out" / written.tensors_file.name
    assert tensors.name == "plan.tensors.safetensors"
    assert hash_file(tensors) == written.tensors_file.hash


def test_checkpoints_that_lack_what_the_plan_prunes_are_refused(tmp_path: Path) -> None:
    tensors = weights(DELTA_NET)
    model = write_hf(tmp_path / "model", DELTA_NET, tensors)
    cuts = slices_of(plan_for(model), DELTA_NET)
    name = "model.layers.0.attn.k_proj.weight"
    short = {**tensors, name: tensors[name][1:].clone()}
    with pytest.raises(UserError, match=f"{name} has shape .63, 64., which config.json does not"):
        SlicedSource(SafetensorsSource(write_hf(tmp_path / "short", DELTA_NET, short)), cuts)
    del short[name]
    with pytest.raises(UserError, match=f"lacks {name}, which the plan prunes"):
        SlicedSource(SafetensorsSource(write_hf(tmp_path / "gone", DELTA_NET, short)), cuts)
    bias = "model.layers.1.attn.k_conv1d.bias"
    biased = write_hf(tmp_path / "biased", DELTA_NET, {**tensors, bias: torch.ones(64)})
    with pytest.raises(UserError, match=f"^{bias}: a convolution makes silu.bias. of a channel"):
        SlicedSource(SafetensorsSource(biased), cuts)


def test_a_lora_run_is_pruned_as_the_merged_model(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from flame.checkpoint.fingerprint import fingerprint

    tensors = weights(DELTA_NET)
    base = write_hf(tmp_path / "base", DELTA_NET, tensors)
    module = "model.layers.0.attn.q_proj"
    down, up = torch.rand(3, 64), torch.rand(64, 3)
    run = tmp_path / "lora"
    run.mkdir()
    (run / "config.json").write_text(json.dumps(DELTA_NET))
    (run / "adapter_config.json").write_text('{"lora_alpha": 6, "r": 3}')
    mark = fingerprint(DELTA_NET, resolve(base).source())
    (run / "base.json").write_text(json.dumps({"reference": str(base), "fingerprint": mark}))
    prefix = f"base_model.model.{module}"
    adapters = {f"{prefix}.lora_A.weight": down, f"{prefix}.lora_B.weight": up}
    save_step(adapters, run / "checkpoint", 5, alone=True)
    plan = plan_for(run)
    apply_plan(run, plan, tmp_path / "out")
    source = resolve(tmp_path / "out").source()
    merged = (tensors[f"{module}.weight"] + 2 * (up @ down))[rows_of(plan, f"{module}.", 32)]
    torch.testing.assert_close(source.read(f"{module}.weight"), merged)
    assert resolve(tmp_path / "out").weights.name == "step-0"
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    assert "holds adapters, so the output is the merged model at step 0" in caplog.text


def test_a_disk_that_is_too_small_is_found_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    model = write_hf(tmp_path / "model", DELTA_NET, weights(DELTA_NET))
    plan = plan_for(model)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10, 10, 1000))
    with pytest.raises(UserError, match="free"):
        apply_plan(model, plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()
