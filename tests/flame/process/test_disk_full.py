"""A disk that fills up while a step is saved: one line, nothing half-written, the last kept."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from flame.checkpoint.manager import CheckpointManager
from flame.checkpoint.save import save_step
from flame.checkpoint.steps import verify_step
from flame.errors import UserError
from flame.storage.load_step import load_step
from tests.flame.checkpoint.test_async import manager_of

pytestmark = pytest.mark.skipif(os.geteuid() > 0, reason="mounting needs root")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    mount = tmp_path / "mount"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", mount]).returncode:
        pytest.skip("this machine lets nobody mount")
    yield mount
    subprocess.run(["umount", mount], check=True)


def _assert_first_step_is_whole(folder: Path) -> None:
    assert os.listdir(folder) == ["step-1"]
    verify_step(folder / "step-1")
    loaded = {"weight": torch.zeros(400, 400)}
    load_step(loaded, folder / "step-1")
    assert torch.equal(loaded["weight"], torch.ones(400, 400))


def test_the_step_before_stays_whole(small_disk: Path) -> None:
    state = {"weight": torch.ones(400, 400)}
    save_step(state, small_disk, 1, alone=True)
    with pytest.raises(UserError, match="No space left on device") as caught:
        save_step(state, small_disk, 2, alone=True)
    assert "\n" not in str(caught.value)
    _assert_first_step_is_whole(small_disk)


@pytest.mark.parametrize("background", [False, True])
def test_the_step_before_stays_whole_whoever_saves(small_disk: Path, background: bool) -> None:
    model = nn.Linear(400, 400, bias=False)
    nn.init.ones_(model.weight)
    manager: CheckpointManager = manager_of(small_disk, model, background=background)
    manager.save(1)
    with pytest.raises(UserError, match="No space left on device"):
        manager.save(2)
        manager.save(3)
    manager.close()
    _assert_first_step_is_whole(small_disk)
