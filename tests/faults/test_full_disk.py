"""A disk that fills up under each command: one line, nothing half-written, and then room again.

The same command, started again with more room, ends as it does on a large disk.
"""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.faults.bench import Bench, digests
from tests.faults.tasks import TASKS
from tests.faults.test_kills import check_left, leftovers

pytestmark = pytest.mark.skipif(os.geteuid() > 0, reason="mounting needs root")
PAGE = 4096
FRACTIONS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Of what the undisturbed command leaves: the disk fills at different moments."""


@pytest.mark.parametrize("task", ["apply to dcp", "convert to hf"])
def test_a_disk_fills_up(bench: Bench, task: str) -> None:
    check_full_disk(bench, task, 0.6)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("fraction", FRACTIONS)
@pytest.mark.parametrize("task", TASKS)
def test_a_disk_fills_up_anywhere(bench: Bench, task: str, fraction: float) -> None:
    check_full_disk(bench, task, fraction)


def check_full_disk(bench: Bench, task: str, fraction: float) -> None:
    reference, _ = bench.undisturbed(task)
    place = bench.folder / f"full {task} {fraction}"
    prepare = TASKS[task].prepare
    found = 0 if prepare is None else pages(bench.inputs / "adapted")
    needed = pages(reference / "work") - found
    with small_disk(place / "work", found + max(1, int(fraction * needed))) as resize:
        if prepare is not None:
            prepare(bench.inputs, place)
        outcome = bench.run(task, place)
        assert all(outcome.statuses), outcome.words
        (error,) = [line for line in outcome.said.splitlines() if "rror" in line]
        assert error.startswith("slimstate: error: "), outcome.words
        assert "No space left on device" in error or "GB free" in error
        assert leftovers(place / "work") == []
        check_left(task, place, reference, f"{task}, {fraction}")
        resize(10 * (found + needed))
        again = bench.run(task, place)
        assert set(again.statuses) == {0}, again.words
        assert digests(place / "work") == digests(reference / "work")


def pages(folder: Path) -> int:
    """Pages that the files below `folder` take."""
    return sum(-(-path.stat().st_size // PAGE) for path in folder.rglob("*") if path.is_file())


@contextmanager
def small_disk(mount: Path, size: int) -> Iterator[object]:
    """A file system of `size` pages at `mount`, with a function that gives it another size."""
    mount.mkdir(parents=True)
    options = ["-t", "tmpfs", "-o", f"size={size * PAGE}"]
    if subprocess.run(["mount", *options, "none", mount]).returncode:
        pytest.skip("this machine lets nobody mount")

    def resize(pages: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={pages * PAGE}", mount], check=True)

    try:
        yield resize
    finally:
        subprocess.run(["umount", mount], check=True)
