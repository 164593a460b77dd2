"""`slimstate serve-check`, and what planning for an engine writes and says."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from launch import cli
from launch.reporting.collect import collect
from pruning.methods import METHODS
from pruning.planning.budgets import Budget
from pruning.planning.choose import choose
from pruning.planning.plan_file import plan_text
from pruning.serving.contract import ENGINES
from tests.launch.serving.published import PUBLISHED
from tests.memory_source import MemorySource
from tests.pruning.hybrids import CONFIGS, build


def written(folder: Path, name: str, config: dict[str, Any]) -> str:
    file = folder / f"{name}.json"
    file.write_text(json.dumps(config))
    return str(file)


@pytest.fixture
def dense(tmp_path: Path) -> str:
    return written(tmp_path, "dense", PUBLISHED["Qwen3.5-27B"][0])


def test_a_row_a_kernel_and_a_line_an_engine(
    dense: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "verdicts.json"
    words = ["--for", "vllm-gpu,vllm-cpu", "--tensor-parallel", "8", "--json", str(file)]
    cli.main(["serve-check", dense, *words])
    said = capsys.readouterr().out
    assert re.search(r"vLLM 0\.32\.0 +Qwen3_5ForCausalLM +Triton +prefill and decoding", said)
    assert re.search(r"vllm-cpu .*say --dtype bfloat16; tensor parallel 1, 2, 4, 8\n", said)
    assert "sglang" not in said
    gpu, cpu = json.loads(file.read_text())["engines"]
    assert cpu["kernels"][0]["evidence"] == "run" and "serve_vllm" in cpu["kernels"][0]["source"]
    assert gpu["tensor_parallel"] == [1, 2, 4, 8]


def test_a_plan_is_looked_at_as_what_comes_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = CONFIGS["qwen3_5_text"]
    source = MemorySource(dict(build(config).state_dict()))
    plan = choose(config, source, METHODS["l1"](), Budget(width=8, multiple_of=1))
    folder = tmp_path / "pruned"
    folder.mkdir()
    (folder / "plan.json").write_text(plan_text(plan))
    (folder / "config.json").write_text(json.dumps(plan.config_after))
    for model in (folder / "plan.json", folder):
        cli.main(["serve-check", str(model)])
        said = capsys.readouterr().out
        assert "linear heads of 8 x 24 channels" in said or "softmax heads of 24" in said
    (folder / "config.json").write_text(json.dumps(config))
    cli.main(["serve-check", str(folder)])
    assert "the dense model has" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--tensor-parallel", "3"], r"--tensor-parallel 3: 16 key heads do not divide by 3"),
        (["--tensor-parallel", "0"], "at least 1"),
        (["--for", "tgi"], r"--for: unknown 'tgi': choose from vllm-gpu"),
        (["--for", "mlx-lm"], "mlx-lm does not serve this model: it has no class"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], expected: str, dense: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["serve-check", dense, *words])
    assert end.value.code == 1
    assert re.fullmatch(rf"slimstate: error: [^\n]*{expected}[^\n]*\n", capsys.readouterr().err)


def test_prune_says_who_serves_the_result_and_refuses_before_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    build(CONFIGS["qwen3_5_text"] | {"head_dim": 32}).save_pretrained("dense")
    words = ["--method", "l1", "--ratio", "0.5", "--space", "square"]
    with pytest.raises(SystemExit):
        cli.main(["prune", "dense", "pruned", *words, "--for", "vllm-cpu"])
    said = capsys.readouterr().err
    assert re.search(r"error: --space square --for vllm-cpu: .*8 x 8 channels.*64 or 128\n", said)
    assert not Path("pruned").exists()
    cli.main(["prune", "dense", "pruned", *words, "--for", "sglang"])
    said = capsys.readouterr().out
    assert re.search(r"note: --for sglang keeps 8 of 16 key channels and 8 of 24 value", said)
    assert re.search(r"serving: sglang .*Qwen3_5ForCausalLM on Triton; tensor parallel 1", said)
    assert json.loads(Path("pruned/plan.json").read_text())["budget"]["for"] == "sglang"
    data = collect([Path("pruned")])
    said = {name: text for name, text in data.plans["pruned"].items() if "served by" in name}
    assert len(said) == len(ENGINES)
    assert said["served by sglang (SGLang 0.5.23, read)"].startswith("Qwen3_5ForCausalLM on Triton")
    assert "--space key,value --for sglang" in data.commands[0]
