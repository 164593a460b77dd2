"""Steps saved while training goes on: the same as others, whole or not there, one at a time."""

import os
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from flame.checkpoint import background
from flame.checkpoint.manager import CheckpointManager
from flame.checkpoint.save import save_step
from flame.checkpoint.steps import verify_step, whole_steps
from flame.errors import UserError
from flame.process.collective_timeout import naming_hung_ranks
from flame.storage.checksums import read_checksums
from flame.storage.load_step import load_step
from tests.distributed import run_distributed
from tests.flame.jobs import losses_of, train_job


class _Loader:
    def state_dict(self) -> dict[str, int]:
        return {"next": 1}

    def merge_states(self, states: list[dict[str, int]]) -> dict[str, int]:
        return states[0]

    def load_state_dict(self, state: dict[str, int]) -> None:
        assert state == {"next": 1}


def manager_of(
    folder: Path, model: nn.Module, keep: int = 0, background: bool = True
) -> CheckpointManager:
    """A manager that saves every step of `model`."""
    options: dict[str, Any] = {"interval": 1, "keep": keep, "background": background}
    return CheckpointManager(folder, model, {"counts": {"seen": 5}}, _Loader(), **options)


def _weight(step: Path) -> float:
    loaded = {"weight": torch.zeros(1, 2)}
    load_step(loaded, step, alone=True)
    return float(loaded["weight"][0, 0])


class _Gate:
    """Holds `save_step` until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened, self.error = threading.Event(), None
        self.real = background.save_step
        monkeypatch.setattr(background, "save_step", self)

    def __call__(self, *arguments: Any) -> Path:
        assert self.opened.wait(60)
        if self.error is not None:
            raise self.error
        return self.real(*arguments)


def test_training_goes_on_while_a_copy_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, model = _Gate(monkeypatch), nn.Linear(2, 1)
    manager = manager_of(tmp_path, model, keep=1)
    nn.init.constant_(model.weight, 1.0)
    manager.save(1)
    nn.init.constant_(model.weight, 2.0)
    assert os.listdir(tmp_path) == []
    gate.opened.set()
    manager.save(2)
    assert _weight(tmp_path / "step-1") == 1.0 or whole_steps(tmp_path) == [2]
    nn.init.constant_(model.weight, 3.0)
    manager.save(3, last_step=True)
    assert os.listdir(tmp_path) == ["step-3"] and _weight(tmp_path / "step-3") == 3.0
    manager.close()


def test_what_went_wrong_is_said_at_the_next_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, manager = _Gate(monkeypatch), manager_of(tmp_path, nn.Linear(2, 1))
    gate.error = UserError("cannot write: No space left on device")
    gate.opened.set()
    manager.save(1)
    with pytest.raises(UserError, match="No space left"):
        manager.save(2)
    assert whole_steps(tmp_path) == []
    gate.error = None
    manager.save(3)
    manager.close()
    assert whole_steps(tmp_path) == [3]


def save_beside_a_rank_that_hangs(folder: Path) -> str:
    """Save in the background while rank 1's thread sleeps; return the error of the next save."""
    if dist.get_rank() == 1:
        background.save_step = _sleep
    options: dict[str, Any] = {"interval": 1, "keep": 0, "background": True}
    counts, patience = {"counts": {"seen": 5}}, timedelta(seconds=1)
    manager = CheckpointManager(
        folder, nn.Linear(2, 1), counts, _Loader(), patience=patience, **options
    )
    try:
        manager.save(1)
        with naming_hung_ranks(2):
            manager.save(2)
    except UserError as error:
        return str(error)
    finally:
        manager.close()
        background.save_step = save_step
    return ""


def _sleep(*arguments: Any) -> Path:
    time.sleep(6)
    raise UserError("slept")


@pytest.mark.slow
def test_a_rank_that_hangs_in_the_background_is_named(tmp_path: Path) -> None:
    errors = run_distributed(save_beside_a_rank_that_hangs, 2, tmp_path)
    assert errors[0].startswith("rank 1 hangs: no answer in step 2 for ")
    assert errors[1] == "slept"


def test_settling_waits_for_the_step_in_flight_and_leaves_its_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, manager = _Gate(monkeypatch), manager_of(tmp_path, nn.Linear(2, 1))
    manager.save(1)
    threading.Timer(0.2, gate.opened.set).start()
    manager.settle()
    assert whole_steps(tmp_path) == [1]
    gate.error = UserError("cannot write")
    manager.save(2)
    manager.settle()
    with pytest.raises(UserError, match="cannot write"):
        manager.save(3)
    manager.close()


@pytest.mark.parametrize("in_background", [False, True])
def test_a_step_that_another_run_left_is_replaced(tmp_path: Path, in_background: bool) -> None:
    for value in (1.0, 2.0):
        model = nn.Linear(2, 1)
        nn.init.constant_(model.weight, value)
        manager = manager_of(tmp_path, model, background=in_background)
        manager.save(1)
        manager.close()
    assert _weight(tmp_path / "step-1") == 2.0


def test_a_step_of_an_earlier_version_is_loaded(tmp_path: Path) -> None:
    """It has no count of skipped steps; what else is missing is an error."""
    model, place = nn.Linear(2, 1), {"interval": 1, "keep": 0}
    saved: dict[str, Any] = {"train_state": {"step": 7}}
    CheckpointManager(tmp_path, model, saved, _Loader(), **place).save(1)
    known: dict[str, Any] = {"train_state": {"step": 0, "skipped_steps": 0}}
    CheckpointManager(tmp_path, model, known, _Loader(), **place).load()
    assert known == {"train_state": {"step": 7, "skipped_steps": 0}}
    more: dict[str, Any] = {"train_state": {"step": 0, "something": 0}}
    with pytest.raises(UserError, match="lacks train_state.something"):
        CheckpointManager(tmp_path, model, more, _Loader(), **place).load()


def test_a_run_saved_in_the_background_is_that_of_any_other(
    assets: Path, two_ranks: Path, tmp_path: Path
) -> None:
    """Of two processes, stopped after three steps and resumed."""
    asked = {"checkpoint__async_mode": "async", "checkpoint__interval": 1}
    run_distributed(train_job, 2, assets, tmp_path / "run", training__steps=4, **asked)
    run_distributed(train_job, 2, assets, tmp_path / "run", **asked)
    checkpoints = tmp_path / "run" / "checkpoint"
    assert whole_steps(checkpoints) == [1, 2, 3, 4, 5, 6]
    for step in (3, 6):
        name = f"step-{step}"
        verify_step(checkpoints / name)
        ours, theirs = (
            {file: value for file, value in read_checksums(folder / name).items() if file[0] != "."}
            for folder in (checkpoints, two_ranks / "checkpoint")
        )
        assert ours == theirs
    assert losses_of(tmp_path / "run") == losses_of(two_ranks)
