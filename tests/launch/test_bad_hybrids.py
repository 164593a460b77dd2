"""Bad input around hybrids: one line that says what to do, a non-zero exit, and nothing written."""

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from launch import cli
from tests.flame.hugging_face.test_outer_model import write_outer
from tests.pruning.families import build as build_fla
from tests.pruning.families import tiny_config
from tests.pruning.hybrids import CONFIGS, build
from tests.pruning.models import write_hf, write_text

HYBRID = CONFIGS["qwen3_5_text"] | {"vocab_size": 300}
VISION = {"model_type": "qwen3_5_vision", "depth": 1, "hidden_size": 16, "patch_size": 16}
CONFIG_ONLY: dict[str, dict[str, Any]] = {
    "no-types": {key: value for key, value in HYBRID.items() if key != "layer_types"},
    "no-linear": HYBRID | {"layer_types": ["full_attention"] * 3},
    "vision": VISION,
    "vision-outside": {"model_type": "qwen3_5", "vision_config": VISION},
}
"""Configs that do not go with the weights of `hybrid` beside them."""


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("originals") / "folder"
    write_hf(folder / "hybrid", HYBRID, dict(build(HYBRID).state_dict()))
    kda = tiny_config("kda")
    write_hf(folder / "kda", kda, dict(build_fla(kda).state_dict()))
    for name, config in CONFIG_ONLY.items():
        shutil.copytree(folder / "hybrid", folder / name)
        (folder / name / "config.json").write_text(json.dumps(config))
    write_outer(folder / "no-mtp", mtp=False)
    config = json.loads((folder / "no-mtp" / "config.json").read_text())
    config["text_config"]["mtp_num_hidden_layers"] = 1
    (folder / "no-mtp" / "config.json").write_text(json.dumps(config))
    write_text(folder)
    return folder


@pytest.fixture
def folder(originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    copy = tmp_path / "folder"
    shutil.copytree(originals, copy)
    monkeypatch.chdir(copy)
    return copy


L1 = "--method l1 --ratio 0.5"
TEXT = "--perplexity text.jsonl --tokenizer tokenizer --seq-len 64 --max-sequences 2"
TOWER = r"config\.json is of a vision tower alone \(qwen3_5\w*\): .*give the checkpoint"
WRONG_LAYERS = (
    r"no tensor model\.layers\.1\.linear_attn\.\S+: is config\.json its own, with the layer_t"
)
NO_MTP = r"has an MTP head, but no tensor mtp\.layers\.0\.… is there: .*mtp_num_hidden_layers to 0"
CASES = {
    f"prune no-mtp out --to hf {L1}": NO_MTP,
    "convert no-mtp out --to hf": NO_MTP,
    f"prune no-types out {L1}": WRONG_LAYERS,
    f"plan no-types out {L1}": WRONG_LAYERS,
    f"eval no-types {TEXT}": r"has model\.layers\.1\.self_attn.*is config\.json its own\?",
    "convert no-types out --to dcp": r"has model\.layers\.1\.self_attn.*is config\.json its own\?",
    f"prune no-linear out {L1}": "layer_types names no linear_attention, so there is nothing",
    f"plan no-linear out {L1}": "layer_types names no linear_attention, so there is nothing",
    "serve-check no-linear": "layer_types names no linear_attention, so there is nothing",
    f"plan hybrid out {L1} --space square --multiple-of 32": "no reduction: choose another ratio",
    "plan hybrid out --method l1 --space square --width 24": "d_k is 16 and d_v 24, so a square",
    f"prune kda out {L1} --space square": "kind 'value' can be pruned in a kda model, because",
    "serve-check hybrid --tensor-parallel 2": "3 key heads do not divide by 2; sizes that do are 1",
    "serve-check hybrid --for tgi": "unknown 'tgi': choose from vllm-gpu",
    f"plan hybrid out {L1} --for tgi": "unknown 'tgi': choose from vllm-gpu",
    f"prune hybrid out {L1} --for vllm-gpu,tgi": "unknown 'tgi': choose from vllm-gpu",
    **{
        command.format(model=model): TOWER
        for model in ("vision", "vision-outside")
        for command in (
            "prune {model} out " + L1, "eval {model} " + TEXT, "convert {model} out --to dcp",
            "capacity {model}", "serve-check {model}",
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("line", CASES)
def test_it_is_refused_in_one_line(
    line: str, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = sorted(folder.rglob("*"))
    with pytest.raises(SystemExit) as end:
        cli.main(shlex.split(line))
    said = capfd.readouterr().err
    assert end.value.code not in (0, None)
    assert re.fullmatch(rf"slimstate: error: [^\n]*{CASES[line]}[^\n]*\n", said), said
    assert sorted(folder.rglob("*")) == before
