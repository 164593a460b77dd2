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


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_hybrid_recalls_with_half_of_its_linear_layers(tmp_path: Path) -> None:
    dense, sizes = tmp_path / "mqar-hybrid", {"key": 8192, "head": 8192, "square": 4096}
    recipe = "launch/recipes/mqar_hybrid.toml"
    slimstate("train", "--config", recipe, "--job.dump_folder", dense, "--nproc", "2")
    for space in sizes:
        budget = ("--space", space, "--ratio", "0.5", "--sequences", "64")
        slimstate("prune", dense, tmp_path / space, "--method", "output-error", *budget)
    slimstate("prune", dense, tmp_path / "random", "--method", "random", "--ratio", "0.5")
    models = [dense, *(tmp_path / space for space in sizes), tmp_path / "random"]
    slimstate("recall", *models, "--pairs", "16", "--json", tmp_path / "recall.json")
    records = list(json.loads((tmp_path / "recall.json").read_text())["models"].values())
    whole, *pruned, random = (record["mqar"][0]["accuracy"] for record in records)
    assert whole > 0.98 and min(pruned) > whole - 0.02
    assert random < whole - 0.05
    assert [record["state_bytes"] for record in records] == [16384, *sizes.values(), 8192]
