"""Ctrl-C and SIGTERM before every operation on files: silence, the shell's status, nothing left."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.faults.bench import Bench, digests
from tests.faults.fork_server import Job
from tests.faults.tasks import run_task

SOME = {
    ("convert to dcp", signal.SIGINT): 9,
    ("apply to dcp", signal.SIGTERM): 11,
    ("convert to hf", signal.SIGTERM): 13,
}
"""For the fast part: every so many operations."""


def run_signalled(task: str, inputs: Path, place: Path, number: int, at: int) -> None:
    """Run a task as the command does, and send itself a signal before the `at`th operation."""
    from flame.errors import run_stage

    seen = 0

    def on_event(event: str, values: tuple[Any, ...]) -> None:
        nonlocal seen
        below = event in ("open", "os.mkdir", "os.rename") and str(place / "work") in str(values[0])
        if below or event in ("os.remove", "os.rmdir"):
            seen += 1
            if seen == at:
                os.kill(os.getpid(), number)

    sys.addaudithook(on_event)
    run_stage(lambda: run_task(task, inputs, place))
    (place / "came-too-late").touch()


def check(bench: Bench, task: str, number: int, folder: Path, every: int) -> None:
    reference, _ = bench.undisturbed(task)
    for at in range(1, 500, every):
        place = folder / f"{task} {at}"
        place.mkdir()
        arguments = (task, bench.inputs, place, number, at)
        outcome = bench.server.run(Job(run_signalled, arguments, 1, place))
        if outcome.statuses == (0,):
            assert (place / "came-too-late").exists() and at > every
            return
        # What rank 0 is about to hold is said before the work.
        words = [line for line in outcome.words.splitlines() if "rank 0 alone" not in line]
        assert (outcome.statuses, words) == ((128 + number,), []), f"{task} at {at}"
        left, whole = digests(place / "work"), digests(reference / "work", reference)
        assert not left or set(left) == set(whole), f"{task} at {at}: {sorted(left)}"
    raise AssertionError("the task does not come to its end")


@pytest.mark.parametrize(("task", "number"), SOME)
def test_a_signal_while_writing(bench: Bench, tmp_path: Path, task: str, number: int) -> None:
    check(bench, task, number, tmp_path, SOME[task, signal.Signals(number)])


def calibrate(inputs: Path, stats: Path, number: int, point: int) -> None:
    """Calibrate, and send itself a signal when resume point `point` begins to be written."""
    from flame.errors import run_stage
    from pruning import calibrate as stage

    seen = 0

    def on_event(event: str, values: tuple[Any, ...]) -> None:
        nonlocal seen
        if event == "os.mkdir" and str(values[0]).endswith(".tmp"):
            seen += 1
            if seen == point:
                os.kill(os.getpid(), number)

    words = [str(inputs / "dense"), str(stats), "--methods", "drrqr", "--sequences", "20"]
    options = stage.STAGE.parse([*words, "--seq-len", "16", "--save-every", "8"])
    sys.addaudithook(on_event)
    run_stage(lambda: stage.run(options))


@pytest.mark.parametrize(
    ("point", "says"),
    [
        (1, "stopped; nothing is kept (--save-every N keeps what was done)\n"),
        (2, "stopped; 8 of 20 sequences are kept: --resume goes on from there\n"),
    ],
)
def test_a_calibration_that_is_stopped_says_how_to_go_on(
    bench: Bench, tmp_path: Path, point: int, says: str
) -> None:
    job = Job(calibrate, (bench.inputs, tmp_path / "stats", signal.SIGINT, point), 1, tmp_path)
    outcome = bench.server.run(job)
    assert (outcome.statuses, outcome.words) == ((130,), says)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("task", ["convert to dcp", "convert to hf", "apply to dcp", "apply to hf"])
def test_a_signal_at_every_operation(bench: Bench, tmp_path: Path, task: str, number: int) -> None:
    check(bench, task, number, tmp_path, 1)
