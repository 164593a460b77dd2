"""Adapters keep the scale that they were trained with: those started from, and a run's own."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import flame.register  # noqa: F401
from flame.checkpoint.load import load_model
from flame.checkpoint.reference import resolve
from flame.errors import UserError
from flame.model import meta_model, restore_after_to_empty
from flame.recipe.sections import Lora
from flame.recovery.lora import inject, load_adapters
from tests.flame.jobs import make_job, train_job
from tests.flame.lora.adapter_kinds import UNTIED, lora, save_adapters
from tests.flame.lora.test_merging import adapters_on, as_folder
from tests.flame.tiny import build, stored_tensors

TOKENS = torch.arange(40)[None] % 67


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "hf"
    return as_folder(folder, UNTIED, stored_tensors(build(UNTIED)))


@pytest.mark.parametrize(
    "options",
    [
        {"lora_alpha": 3},
        {"use_rslora": True},
        {"rank_pattern": {"o_proj": 2}, "alpha_pattern": {r"layers\.0\.attn\.q.*": 5}},
    ],
    ids=str,
)
def test_adapters_that_training_starts_from_compute_as_in_peft(
    base: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    folder = adapters_on(base, save_adapters(tmp_path / "a", lora(**options), build(UNTIED)))
    section = Lora(rank=4, alpha=64.0, target_modules=["q_proj", "o_proj"], train_also=[])
    section.init = str(folder)
    model = meta_model(UNTIED)
    inject(model, section)
    model.to_empty(device="cpu")
    restore_after_to_empty(model)
    plain = stored_tensors(build(UNTIED))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" not in name:
                parameter.copy_(plain[name.replace(".base_layer.", ".")])
        load_adapters(model, resolve(folder).own_source())
        expected = load_model(resolve(folder))(TOKENS).logits
        torch.testing.assert_close(model.eval()(TOKENS).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def run(assets: Path, two_ranks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of adapters that started from rank-stabilised ones with alpha 6."""
    folder = tmp_path_factory.mktemp("run")
    model = load_model(resolve(two_ranks))
    config = lora(use_rslora=True, lora_alpha=6, target_modules=["q_proj", "k_proj"])
    adapters_on(two_ranks, save_adapters(folder / "start", config, model))
    train_job(assets, folder / "run", **options(two_ranks, folder / "start"))
    return folder / "run"


def options(base: Path, start: Path) -> dict[str, Any]:
    values = {"rank": 4, "init": str(start), "merge": False, "target_modules": ["q_proj", "k_proj"]}
    return {
        "model__init": str(base),
        "training__steps": 2,
        **{f"lora__{name}": value for name, value in values.items()},
    }


def test_a_run_records_the_scale_that_it_used(run: Path) -> None:
    from flame.recipe import read_tables

    section = read_tables(run / "recipe.toml")["lora"]
    assert (section["alpha"], section["rslora"]) == (6.0, True)
    recorded = json.loads((run / "adapter_config.json").read_text())
    assert (recorded["lora_alpha"], recorded["use_rslora"]) == (6, True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lora__init": ""}, "lora.alpha is 64.0, .* trained with 6"),
        ({"lora__init": "", "lora__alpha": 6.0}, "lora.rslora is False, .* trained with True"),
        ({"lora__init": "", "lora__alpha": 6.0, "lora__rslora": True}, ""),
        ({}, ""),
    ],
    ids=str,
)
def test_a_run_goes_on_with_its_own_scale_alone(
    assets: Path, two_ranks: Path, run: Path, change: dict[str, Any], words: str
) -> None:
    from flame.training.job_checks import check_job

    job = make_job(assets, run, **{**options(two_ranks, run.parent / "start"), **change})
    if not words:
        return check_job(job, 1)
    with pytest.raises(UserError, match=words):
        check_job(job, 1)


@pytest.mark.parametrize(
    ("config", "change", "words"),
    [
        ({"init_lora_weights": "pissa"}, {}, "init_lora_weights pissa"),
        ({"use_dora": True}, {}, "lora.dora is False"),
        ({"r": 2}, {}, "lora.rank is 4, .* rank 2"),
        ({"target_modules": ["o_proj"]}, {}, "has no .*_proj.lora_A"),
        ({}, {"lora__train_also": ["convl1d"]}, "train_also names 'convl1d'.*did you mean"),
    ],
    ids=str,
)
def test_what_cannot_be_started_from_is_refused_before_work(
    assets: Path,
    two_ranks: Path,
    tmp_path: Path,
    config: dict[str, Any],
    change: dict[str, Any],
    words: str,
) -> None:
    from flame.training.job_checks import check_job

    made = lora(**{"target_modules": ["q_proj", "k_proj"], **config})
    start = save_adapters(tmp_path / "start", made, load_model(resolve(two_ranks)))
    job = make_job(
        assets, tmp_path / "run", **options(two_ranks, adapters_on(two_ranks, start)), **change
    )
    with pytest.raises(UserError, match=words):
        check_job(job, 1)
    assert not (tmp_path / "run").exists()
