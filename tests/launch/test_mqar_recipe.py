"""The recipe for associative recall, trained as a person would, and what pruning does to it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def slimstate(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "launch.cli", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_recipe_learns_recall_and_pruning_at_random_loses_it(tmp_path: Path) -> None:
    dense = tmp_path / "mqar"
    recipe = "launch/recipes/mqar.toml"
    slimstate("train", "--config", recipe, "--job.dump_folder", dense, "--nproc", "2")
    budget = ("--ratio", "0.5", "--sequences", "64")
    slimstate("prune", dense, tmp_path / "random", "--method", "random", *budget)
    slimstate("prune", dense, tmp_path / "drrqr", "--method", "drrqr", *budget)
    models = [dense, tmp_path / "random", tmp_path / "drrqr"]
    slimstate("recall", *models, "--pairs", "16", "--json", tmp_path / "recall.json")
    records = list(json.loads((tmp_path / "recall.json").read_text())["models"].values())
    whole, random, drrqr = (record["mqar"][0]["accuracy"] for record in records)
    assert whole > 0.95
    assert random < whole - 0.2
    assert drrqr > random
    assert [record["state_bytes"] for record in records] == [8192, 4096, 4096]
