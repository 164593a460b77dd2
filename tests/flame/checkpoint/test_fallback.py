"""A damaged newest step: found by its checksum and named, or passed over where that is allowed."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flame.checkpoint.save import save_step
from flame.checkpoint.steps import whole_steps
from flame.errors import UserError
from flame.training.start_checks import check_start
from tests.distributed import run_distributed
from tests.flame.damage import flip_byte
from tests.flame.jobs import largest_difference, train_job


def _job(folder: Path, fallback: bool, load_step: int = -1) -> Any:
    return SimpleNamespace(
        job=SimpleNamespace(dump_folder=str(folder)),
        checkpoint=SimpleNamespace(folder="", load_step=load_step, fallback=fallback),
        model=SimpleNamespace(init=""),
        lora=SimpleNamespace(rank=0),
        distill=SimpleNamespace(teacher=""),
    )


def _damage(step: Path) -> None:
    flip_byte(next(step.glob("__0_*.distcp")))


def _save(folder: Path, *steps: int) -> None:
    for step in steps:
        save_step({"weight": torch.ones(64, 64)}, folder, step, alone=True)


def test_the_step_before_is_used_where_that_is_allowed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _save(tmp_path, 1, 2, 3)
    _damage(tmp_path / "step-3")
    _damage(tmp_path / "step-2")
    with pytest.raises(UserError, match=r"step-3/__0_0.distcp is damaged.*--fallback .* step-2$"):
        check_start(_job(tmp_path, fallback=False))
    assert whole_steps(tmp_path) == [1, 2, 3]
    check_start(_job(tmp_path, fallback=True))
    assert sorted(os.listdir(tmp_path)) == ["damaged-2", "damaged-3", "step-1"]
    said = [
        record.getMessage()
        for record in caplog.records
        if record.name == "flame.training.start_checks"
    ]
    assert len(said) == 2 and "step-3/__0_0.distcp is damaged" in said[0]
    assert "going on from step-2" in said[0] and "going on from step-1" in said[1]


@pytest.mark.parametrize(("steps", "load_step"), [((1,), -1), ((1, 2), 2)])
def test_a_step_without_another_or_asked_for_is_refused(
    tmp_path: Path, steps: tuple[int, ...], load_step: int
) -> None:
    _save(tmp_path, *steps)
    _damage(tmp_path / f"step-{steps[-1]}")
    with pytest.raises(UserError, match="is damaged"):
        check_start(_job(tmp_path, fallback=True, load_step=load_step))
    assert whole_steps(tmp_path) == list(steps)


def test_a_step_with_later_ones_is_not_gone_on_from(tmp_path: Path) -> None:
    """Its own steps would be purged as the oldest."""
    _save(tmp_path, 1, 2)
    with pytest.raises(UserError, match="load_step is 1, and step-2 lies after it: move that away"):
        check_start(_job(tmp_path, fallback=False, load_step=1))
    assert whole_steps(tmp_path) == [1, 2]


def test_training_goes_on_from_the_step_before_and_ends_the_same(
    assets: Path, two_ranks: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(two_ranks, run)
    _damage(run / "checkpoint" / "step-6")
    run_distributed(train_job, 2, assets, run, checkpoint__fallback=True)
    final = Path("checkpoint") / "step-6"
    assert largest_difference(run / final, two_ranks / final) == 0.0
    assert (run / "checkpoint" / "damaged-6").is_dir()
