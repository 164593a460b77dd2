"""References that people write, and conversion between the formats, bit for bit."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from flame.checkpoint.convert import convert
from flame.checkpoint.fingerprint import fingerprint
from flame.checkpoint.reference import resolve
from flame.checkpoint.save import save_step
from flame.checkpoint.source import TensorInfo
from flame.checkpoint.steps import METADATA, verify_step
from flame.convert import STAGE, Options, check
from flame.errors import UserError
from flame.hugging_face import model_folder
from flame.hugging_face.model_folder import write_hf
from flame.hugging_face.safetensors_source import SafetensorsSource
from flame.process.output_checks import MADE
from flame.storage.checksums import CHECKSUMS
from flame.storage.load_step import load_step
from tests.flame.damage import Bomb, rewrite
from tests.flame.tiny import (
    GATED_DELTANET,
    LLAMA,
    build,
    stored_tensors,
    write_hf_folder,
    write_run,
)


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return write_hf_folder(tmp_path / "hf", GATED_DELTANET, stored_tensors(build(GATED_DELTANET)))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    state = {**build(GATED_DELTANET).state_dict(), "train_state": {"step": torch.tensor(3)}}
    return write_run(tmp_path / "run", GATED_DELTANET, state)


def test_a_run_resolves_to_its_latest_whole_step(run: Path) -> None:
    save_step({"a": torch.ones(1)}, run / "checkpoint", 12, alone=True)
    (run / "checkpoint" / "step-20").mkdir()
    (run / "recipe.toml").write_text("")
    (run / "tokenizer.json").write_text("{}")
    found = resolve(run)
    assert found.kind == "dcp" and found.step_folder == run / "checkpoint" / "step-12"
    assert found.recipe == run / "recipe.toml" and found.tokenizer == run
    assert found.config == GATED_DELTANET and found.weights == found.step_folder
    assert resolve(run, step=3).step_folder == run / "checkpoint" / "step-3"
    by_step = resolve(run / "checkpoint" / "step-3")
    assert by_step == resolve(run, step=3)
    assert resolve(run / "checkpoint").step_folder == found.step_folder


def test_a_hugging_face_folder_resolves(hf: Path) -> None:
    found = resolve(str(hf))
    assert found.kind == "hf" and found.folder == found.weights == found.tokenizer == hf
    assert found.kind == "hf" and found.step_folder is None and found.recipe is None
    (hf / "tokenizer.json").unlink()
    assert resolve(hf).tokenizer is None


def test_references_that_cannot_be_resolved(tmp_path: Path, run: Path, hf: Path) -> None:
    def complaint(reference: Path | str, step: int | None = None) -> str:
        with pytest.raises(UserError) as caught:
            resolve(reference, step)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert complaint(tmp_path / "missing").endswith("missing: no such folder")
    assert "is a file" in complaint(hf / "config.json")
    (tmp_path / "empty").mkdir()
    assert "empty has no config.json" in complaint(tmp_path / "empty")
    assert "it has no step 3" in complaint(hf, step=3)
    assert "no whole step 4: choose from 3" in complaint(run, step=4)
    assert "is a step already" in complaint(run / "checkpoint" / "step-3", step=3)
    (run / "checkpoint" / "step-3" / METADATA).unlink()
    assert "no whole step: step-3 half-written or damaged" in complaint(run)
    assert "half-written or damaged" in complaint(run / "checkpoint" / "step-3")
    (hf / "model.safetensors").unlink()
    assert "neither safetensors nor checkpoints" in complaint(hf)
    for text, message in {
        "{": "config.json is not JSON",
        "\ud800": "config.json is not JSON",
        "[]": "config.json is not a JSON object",
        "{}": "config.json has no model_type",
    }.items():
        (hf / "config.json").write_bytes(text.encode(errors="surrogatepass"))
        assert message in complaint(hf)


def test_a_hub_name_without_a_network_fails_in_seconds(monkeypatch: Any, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    started = time.monotonic()
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set") as caught:
        resolve("fla-hub/some-model-1.3B")
    assert time.monotonic() - started < 5 and "\n" not in str(caught.value)
    (tmp_path / "runs").mkdir()
    with pytest.raises(UserError, match="no such folder$"):
        resolve("runs/dense")


def _mixed(config: dict[str, Any]) -> dict[str, Tensor]:
    """Weights in bf16 but for norms and gates, as published models have them."""
    tensors = stored_tensors(build(config))
    keep = ("norm", "A_log", "dt_bias")
    return {n: t if any(k in n for k in keep) else t.bfloat16() for n, t in tensors.items()}


def _identical(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        t.dtype == right[n].dtype and torch.equal(_bits(t), _bits(right[n]))
        for n, t in left.items()
    )


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("config", [GATED_DELTANET, LLAMA], ids=["untied", "tied"])
def test_a_model_goes_to_dcp_and_back_bit_for_bit(tmp_path: Path, config: dict[str, Any]) -> None:
    config = {**config, "dtype": "bfloat16", "custom": {"kept": [1, None]}}
    tensors = _mixed(config)
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    source = write_hf_folder(tmp_path / "hf", config, tensors)
    convert(source, tmp_path / "run", "dcp")
    convert(tmp_path / "run", tmp_path / "back", "hf")
    assert _identical(load_file(tmp_path / "back" / "model.safetensors"), tensors)
    assert set(os.listdir(tmp_path / "back")) - set(os.listdir(source)) == {MADE, "README.md"}
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == config
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        for folder in ("run", "back"):
            assert (tmp_path / folder / name).read_bytes() == (source / name).read_bytes()
    references = [resolve(tmp_path / name) for name in ("hf", "run", "back")]
    assert len({fingerprint(r.config, r.source()) for r in references}) == 1
    verify_step(tmp_path / "run" / "checkpoint" / "step-0")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "hf", "run"]


def test_a_converted_run_holds_what_a_trainer_looks_for(tmp_path: Path) -> None:
    model = build(LLAMA)
    convert(write_hf_folder(tmp_path / "hf", LLAMA, stored_tensors(model)), tmp_path / "r", "dcp")
    state = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    load_step(state, tmp_path / "r" / "checkpoint" / "step-0")
    assert _identical(state, dict(model.state_dict()))


def test_only_the_model_leaves_a_training_step(tmp_path: Path) -> None:
    model = build(GATED_DELTANET)
    moments = {f"state.{n}.exp_avg": torch.ones_like(p) for n, p in model.named_parameters()}
    state = {**model.state_dict(), "optimizer": moments, "lr_scheduler": {"last_epoch": 4}}
    config = {key: value for key, value in GATED_DELTANET.items() if key != "architectures"}
    run = write_run(tmp_path / "run", config, state)
    convert(run, tmp_path / "hf", "hf")
    assert _identical(load_file(tmp_path / "hf" / "model.safetensors"), dict(model.state_dict()))
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert written["architectures"] == ["GatedDeltaNetForCausalLM"]


def test_the_stock_class_loads_what_was_written(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    for config in (GATED_DELTANET, LLAMA):
        model = build(config)
        run = write_run(tmp_path / f"run-{config['model_type']}", config, dict(model.state_dict()))
        out = tmp_path / config["model_type"]
        convert(run, out, "hf")
        loaded, report = AutoModelForCausalLM.from_pretrained(
            out, output_loading_info=True, trust_remote_code=False
        )
        assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys"))
        assert _identical(dict(loaded.state_dict()), dict(model.state_dict()))


def test_large_models_are_split_with_an_index(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(model_folder, "MAX_SHARD_SIZE", 10_000)
    tensors = stored_tensors(build(GATED_DELTANET))
    infos = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in tensors.items()}
    asked: list[str] = []

    def read(name: str) -> Tensor:
        asked.append(name)
        return tensors[name]

    write_hf(tmp_path, GATED_DELTANET, infos, read)
    files = list(tmp_path.glob("model-*.safetensors"))
    assert len(files) > 1 and sorted(asked) == sorted(tensors)
    assert _identical({n: t for file in files for n, t in load_file(file).items()}, tensors)
    source = SafetensorsSource(tmp_path)
    assert _identical({name: source.read(name) for name in source.names()}, tensors)
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1, "weights are readable for whom the config is"
    size = json.loads((tmp_path / "model.safetensors.index.json").read_text())["metadata"]
    assert size["total_size"] == sum(t.nbytes for t in tensors.values())


def test_the_dtype_of_the_config_follows_the_weights(tmp_path: Path) -> None:
    config = {**GATED_DELTANET, "dtype": "bfloat16"}
    write_run(tmp_path / "run", config, dict(build(GATED_DELTANET).state_dict()))
    convert(tmp_path / "run", tmp_path / "hf", "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "float32"


def test_tied_embeddings_that_differ_are_refused(tmp_path: Path) -> None:
    state = dict(build(LLAMA).state_dict())
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    write_run(tmp_path / "run", LLAMA, state)
    with pytest.raises(UserError, match="their values differ"):
        convert(tmp_path / "run", tmp_path / "hf", "hf")
    assert not (tmp_path / "hf").exists()


def test_a_run_keeps_its_recipe_with_the_new_folder(tmp_path: Path, run: Path) -> None:
    (run / "recipe.toml").write_text('[job]\ndump_folder = "old"\n[training]\nseq_len = 77\n')
    convert(run, tmp_path / "copy", "dcp")
    text = (tmp_path / "copy" / "recipe.toml").read_text()
    assert f'dump_folder = "{tmp_path / "copy"}"' in text and "seq_len = 77" in text


DAMAGES = {
    "flipped byte": "is damaged",
    "truncated shard": "is damaged",
    "hostile index": "do not use this file",
    "no checksums": r"has lost its checksums\.json",
    "truncated safetensors": "is damaged",
    "unknown family": "unknown model family 'nonsense'",
}


def _harm(damage: str, tmp_path: Path, run: Path, hf: Path) -> Path:
    step = run / "checkpoint" / "step-3"
    shard = next(step.glob("*.distcp"))
    if damage == "flipped byte":
        data = bytearray(shard.read_bytes())
        data[-1] ^= 4
        shard.write_bytes(bytes(data))
    elif damage == "truncated shard":
        os.truncate(shard, 64)
    elif damage == "hostile index":
        import pickle

        rewrite(step, METADATA, pickle.dumps(Bomb(tmp_path / "was-run")))
    elif damage == "no checksums":
        (step / CHECKSUMS).unlink()
    elif damage == "truncated safetensors":
        os.truncate(hf / "model.safetensors", 900)
    else:
        (hf / "config.json").write_text('{"model_type": "nonsense"}')
    return hf if damage in ("truncated safetensors", "unknown family") else run


@pytest.mark.parametrize("damage", DAMAGES)
def test_nothing_is_written_from_a_damaged_source(
    tmp_path: Path, run: Path, hf: Path, damage: str
) -> None:
    source = _harm(damage, tmp_path, run, hf)
    with pytest.raises(UserError, match=DAMAGES[damage]) as caught:
        convert(source, tmp_path / "out", "hf")
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "run"]


def test_the_disk_must_be_large_enough(tmp_path: Path, hf: Path, monkeypatch: Any) -> None:
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")(10, 9, 1)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"needs .* GB, .* has 0\.0 GB free"):
        convert(hf, tmp_path / "out", "dcp")


def test_the_command_line_is_checked_before_work(tmp_path: Path, run: Path, hf: Path) -> None:
    options = STAGE.parse([str(hf), str(tmp_path / "out"), "--to", "dcp", "--overwrite"])
    assert options == Options(str(hf), tmp_path / "out", "dcp", overwrite=True)
    check(options)
    refused = {
        "exists": Options(str(hf), run, "dcp"),
        "inside the model's folder": Options(str(run), run / "hf", "hf"),
        "would replace the model": Options(
            str(run / "checkpoint" / "step-3"), tmp_path, "hf", overwrite=True
        ),
        "no such folder": Options(str(tmp_path / "no"), tmp_path / "out", "hf"),
    }
    for message, wrong in refused.items():
        with pytest.raises(UserError, match=message):
            check(wrong)


def test_checking_needs_no_torch(tmp_path: Path, hf: Path) -> None:
    code = (
        "import sys; from flame.convert import STAGE, check;"
        f"check(STAGE.parse([{str(hf)!r}, {str(tmp_path / 'out')!r}, '--to', 'dcp']));"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_stage_converts(tmp_path: Path, hf: Path) -> None:
    STAGE.main([str(hf), str(tmp_path / "out"), "--to", "dcp"])
    assert resolve(tmp_path / "out").step_folder == tmp_path / "out" / "checkpoint" / "step-0"


def test_an_error_is_one_line_and_exit_status_one(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "flame.convert", str(tmp_path / "no"), "out", "--to", "hf"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == f"slimstate: error: no model at {tmp_path / 'no'}: no such folder\n"
