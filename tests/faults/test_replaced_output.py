"""Outputs that are killed before every single operation on files.

What is replaced is there at every moment, the old or the new; what is made is made the next time.
"""

import os
import signal
from pathlib import Path

import pytest

from flame.process.output_checks import MADE, mark_as_made
from tests.faults.bench import Bench, digests
from tests.faults.fork_server import Job
from tests.faults.kill_points import Moment, Work
from tests.faults.tasks import RECIPE


def replace(out: Path, can_swap: bool) -> None:
    """Write a folder in the place of another."""
    from flame.process import atomic_output
    from flame.storage import replacement

    if not can_swap:
        replacement.swap = lambda one, other: False  # type: ignore[assignment]
    with atomic_output.replacing_folder(out, overwrite=True) as folder:
        for name in ("a", "b"):
            (folder / name).write_text("new")


@pytest.mark.parametrize("can_swap", [True, False])
def test_an_output_killed_while_it_is_replaced(
    bench: Bench, tmp_path: Path, can_swap: bool
) -> None:
    """On systems that cannot swap two names, the next writer puts the old one back."""
    for number in range(100):
        place = tmp_path / str(number)
        out = place / "work" / "out"
        out.mkdir(parents=True)
        (out / "a").write_text("old")
        mark_as_made(out, ["a"])
        moment, work = Moment("files", number / 100, 0, whole=True), (Work(100, 0, 0),)
        outcome = bench.server.run(Job(replace, (out, can_swap), 1, place, moment, work))
        if can_swap:
            assert contents(out) in ({"a": "old"}, {"a": "new", "b": "new"})
        again = bench.server.run(Job(replace, (out, can_swap), 1, place))
        assert again.statuses == (0,), again.words
        assert contents(out) == {"a": "new", "b": "new"} and os.listdir(out.parent) == ["out"]
        if outcome.statuses == (0,):
            break
    assert 8 < number < 99


def prepare(inputs: Path, run: Path) -> None:
    """Write what a run folder has before its training."""
    from flame.run_folder.prepare import prepare_run_folder
    from tests.flame.jobs import make_job

    prepare_run_folder(make_job(inputs / "assets", run, **RECIPE))


@pytest.mark.slow
def test_a_run_folder_killed_while_it_is_made(bench: Bench, tmp_path: Path) -> None:
    whole = tmp_path / "whole" / "work" / "run"
    job = Job(prepare, (bench.inputs, whole), 1, tmp_path / "whole")
    (work,) = bench.server.run(job).work
    assert work is not None and 10 < work.files < 99
    for number in range(work.files):
        place = tmp_path / str(number)
        run = place / "work" / "run"
        moment = Moment("files", number / work.files + 1e-6, 0, whole=True)
        job = Job(prepare, (bench.inputs, run), 1, place, moment, (work,))
        assert bench.server.run(job).statuses == (-signal.SIGKILL,)
        again = bench.server.run(Job(prepare, (bench.inputs, run), 1, place))
        assert again.statuses == (0,), again.words
        assert digests(run) == digests(whole)


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir() if path.name != MADE}
