"""What a killed launcher leaves, and the next one removes."""

import mmap
import os
import tempfile
from pathlib import Path

import pytest

from launch.processes import leftovers
from launch.processes.leftovers import LOCK, job_folder


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("tmp", "shm"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(leftovers, "SHARED_MEMORY", tmp_path / "shm")
    return tmp_path / "tmp"


def test_the_folder_of_a_dead_job_goes_and_that_of_a_living_one_stays(temporary: Path) -> None:
    dead, new, link = (temporary / f"slimstate-{name}" for name in ("dead", "new", "link"))
    for folder in (dead, new):
        folder.mkdir()
    (dead / LOCK).touch()
    (dead / "rank-0.stderr").touch()
    (temporary / "precious").mkdir()
    link.symlink_to(temporary / "precious")
    with job_folder() as living:
        assert not dead.exists() and new.exists() and link.is_symlink()
        with job_folder() as other:
            assert living.exists() and other != living
        assert living.stat().st_mode & 0o077 == 0
    os.utime(new, (0, 0))
    assert sorted(os.listdir(temporary)) == ["precious", "slimstate-link", "slimstate-new"]


def test_shared_memory_of_a_dead_job_goes(temporary: Path, tmp_path: Path) -> None:
    memory = tmp_path / "shm"
    for name in ("sem.mp-older", "sem.mp-dead", "torch_1_2_3", "nccl-x", "torch_held", "other"):
        (memory / name).write_bytes(bytes(8))
    os.utime(memory / "sem.mp-older", (0, 0))
    (temporary / "slimstate-dead").mkdir()
    (temporary / "slimstate-dead" / LOCK).touch()
    os.utime(temporary / "slimstate-dead" / LOCK, (1e9, 1e9))
    with open(memory / "torch_held", "r+b") as stream, mmap.mmap(stream.fileno(), 8):
        with job_folder():
            pass
    assert sorted(os.listdir(memory)) == ["other", "sem.mp-older", "torch_held"]
