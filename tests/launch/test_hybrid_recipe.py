"""The recipe of a small hybrid, from text to a recovered export, with the commands of a person."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pruning.planning.plan_file import read_plan

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "launch/recipes/hybrid.toml"
TARGETS = "in_proj_qkv in_proj_z out_proj"


def slimstate(*arguments: str | Path, cwd: Path) -> None:
    command = [sys.executable, "-m", "launch.cli", *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_hybrid_is_trained_pruned_recovered_and_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    folders = [tmp_path / name for name in ("dense", "one", "two", "recovered", "export")]
    dense, one, two, recovered, export = folders
    tokenizer = tmp_path / "tokenizer"

    def run(*words: str | Path) -> None:
        slimstate(*words, cwd=ROOT)

    run("tokenizer", tokenizer, "--size", "4096", "--max-documents", "200")
    steps = ("--training.steps", "12", "--lr_scheduler.warmup_steps", "2")
    recipe = ("train", "--config", RECIPE, "--data.tokenizer", tokenizer, *steps)
    run(*recipe, "--job.dump_folder", dense, "--nproc", "2")
    budget = ("--method", "drrqr", "--ratio", "0.5", "--sequences", "4", "--to", "dcp")
    run("prune", dense, one, *budget)
    run("prune", dense, two, *budget, "--nproc", "2")
    plans = [read_plan(folder / "plan.json") for folder in (one, two)]
    for name, kept in plans[0].kept.items():
        assert len(kept) == 4 and all(map(torch.equal, kept, plans[1].kept[name]))
    assert plans[0].config_after["linear_key_head_dim"] == 16
    lora = (
        "--lora.rank",
        "4",
        "--lora.target_modules",
        *TARGETS.split(),
        "--distill.teacher",
        dense,
    )
    run(*recipe, "--init", one, "--job.dump_folder", recovered, *lora, "--nproc", "2")
    run("convert", recovered, export, "--to", "hf")
    _stock_class_computes_what_ours_does(recovered, export)


def _stock_class_computes_what_ours_does(recovered: Path, export: Path) -> None:
    from transformers import AutoModelForCausalLM

    from flame.checkpoint.load import load_model
    from flame.checkpoint.reference import resolve

    stock, ours = AutoModelForCausalLM.from_pretrained(export), load_model(resolve(recovered))
    assert type(stock).__name__ == "Qwen3_5ForCausalLM"
    tokens = torch.randint(4096, (2, 90), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, expected = stock.eval()(tokens).logits, ours.eval()(tokens).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
