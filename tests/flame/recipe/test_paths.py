"""Paths in recipes: beside the recipe, or in the working directory; and run folders that move."""

import os
import shutil
from pathlib import Path

import pytest

from flame.recipe import data_config, read_tables
from tests.distributed import run_distributed
from tests.flame.jobs import make_job, train_job


def test_inputs_lie_beside_the_recipe_or_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flame.config import parse_job

    recipes, here = tmp_path / "recipes", tmp_path / "here"
    for folder in (recipes, here):
        folder.mkdir()
        (folder / "both.jsonl").write_text("")
    (recipes / "config.json").write_text("{}")
    (here / "tokenizer").mkdir()
    (recipes / "recipe.toml").write_text(
        "[job]\ndump_folder = 'runs/a'\n[model]\nconfig = 'config.json'\ninit = 'hub/name'\n"
        "[data]\ntokenizer = 'tokenizer'\nsources = ['both.jsonl?text_key=a', 'hub/set?split=b']\n"
    )
    monkeypatch.chdir(here)
    job = parse_job(["--job.config_file", "../recipes/recipe.toml"])
    assert job.model.config == str(recipes / "config.json")
    assert job.data.sources == [f"{recipes}/both.jsonl?text_key=a", "hub/set?split=b"]
    assert (job.model.init, job.data.tokenizer) == ("hub/name", "tokenizer")
    assert job.job.dump_folder == "runs/a"


def test_a_run_folder_works_from_anywhere_and_after_it_was_moved(
    assets: Path, tmp_path: Path
) -> None:
    """It names its own config and tokenizer, and its text in full; a relative path was given."""
    import tomllib

    run_distributed(train_from, 1, assets, tmp_path, 6)
    moved = shutil.move(tmp_path / "run", tmp_path / "elsewhere")
    written = tomllib.loads((moved / "recipe.toml").read_text())
    assert (written["model"]["config"], written["data"]["tokenizer"]) == ("config.json", ".")
    tables = read_tables(moved / "recipe.toml")
    assert data_config(tables).dataset == str(assets / "text.jsonl")
    assert data_config(tables).tokenizer == str(moved)
    run_distributed(go_on, 1, moved, Path("/"))
    assert (moved / "checkpoint/step-7").is_dir() and not (tmp_path / "run").exists()


def train_from(assets: Path, folder: Path, steps: int) -> None:
    """Train in `folder`, with paths relative to the text's folder."""
    before = Path.cwd()
    os.chdir(assets)
    try:
        train_job(assets, folder / "run", data__dataset="text.jsonl", data__tokenizer="tokenizer")
    finally:
        os.chdir(before)


def go_on(run: Path, here: Path) -> None:
    """What `slimstate train --config RUN/recipe.toml --training.steps 7` does in another folder."""
    from flame.train import STAGE, check
    from flame.train import run as train_stage

    before = Path.cwd()
    os.chdir(here)
    try:
        options = STAGE.parse(["--config", str(run / "recipe.toml"), "--training.steps=7",
                               "--lr_scheduler.total_steps=7"])  # fmt: skip
        check(options)
        train_stage(options)
    finally:
        os.chdir(before)


def test_the_recipe_of_a_run_keeps_what_is_no_path(tmp_path: Path) -> None:
    from flame.recipe.paths import in_run_folder

    job = make_job(tmp_path, tmp_path / "run", data__dataset="mqar:pairs=2", model__init="org/name")
    kept = in_run_folder(job, tmp_path / "run")
    assert (kept.data.dataset, kept.model.init) == ("mqar:pairs=2", "org/name")
    assert job.model.config == str(tmp_path / "config.json") and kept.model.config == "config.json"
