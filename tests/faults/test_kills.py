"""SIGKILL at random moments: of one rank or the whole job, in every stage that writes.

After a kill no step looks whole that is not, nothing outside of the output has changed, and the
same command, started again, ends with the undisturbed result, bit for bit, and without leftovers.

A round's moment comes from its seed, which a failure names; to repeat one:

    pytest -m slow "tests/faults/test_kills.py::test_a_killed_job_is_run_again[train-3]"
"""

import os
import random
import shutil
import signal
from pathlib import Path

import pytest

from flame.checkpoint.steps import (
    broken_steps,
    latest_whole_step,
    step_folder,
    verify_step,
    whole_steps,
)
from tests.faults.bench import Bench, digests
from tests.faults.kill_points import draw
from tests.faults.tasks import STEPS, TASKS

ROUNDS = {
    "train": 14,
    "train in the background": 14,
    "calibrate": 15,
    "apply to dcp": 3,
    "apply to hf": 2,
    "convert to dcp": 2,
    "convert to hf": 2,
    "merge": 5,
}
"""Fifty-seven, in the slow part."""

FEW = {"apply to dcp": 101, "convert to hf": 106}
"""Seeds, for the fast part, of moments in the middle of writing."""

TRIES = 5
"""A moment near the end may come too late; then another is drawn."""

TWICE = 0.3
"""Part of the rounds in which the second start is killed too, if its moment comes in time."""

TRAINED = ("train", "train in the background")


@pytest.mark.parametrize("task", FEW)
def test_a_job_killed_while_it_writes_is_run_again(bench: Bench, task: str) -> None:
    check_round(bench, task, FEW[task])


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("task", "seed"), [(task, n) for task, rounds in ROUNDS.items() for n in range(1, rounds + 1)]
)
def test_a_killed_job_is_run_again(bench: Bench, task: str, seed: int) -> None:
    check_round(bench, task, seed)


def check_round(bench: Bench, task: str, seed: int) -> None:
    """Kill a job at the moments of a seed, look at what it left, run it again, compare."""
    reference, work = bench.undisturbed(task)
    before = digests(bench.inputs)
    generator = random.Random(f"{task} {seed}")
    case, place = _kill(bench, task, seed, generator)
    latest = check_left(task, place, reference, case)
    if generator.random() < TWICE:
        moment = draw(generator, len(work))
        case += f", then {moment}"
        outcome = bench.run(task, place, moment)
        assert not outcome.hung, f"{case}\nranks that were left hang:\n{outcome.words}"
        latest = check_left(task, place, reference, case)
    print(case)
    again = bench.run(task, place)
    assert set(again.statuses) == {0}, f"{case}\n{again.words}"
    if task in TRAINED:
        check_resumed(again.words, latest, case)
        check_losses(place, reference, latest, case)
    assert digests(place / "work") == digests(reference / "work"), case
    assert os.listdir(place / "tmp") == [], case
    assert digests(bench.inputs) == before, case
    shutil.rmtree(place)


def _kill(bench: Bench, task: str, seed: int, generator: random.Random) -> tuple[str, Path]:
    """Draw moments until one comes in time; what it was in words, and the killed job's place."""
    _, work = bench.undisturbed(task)
    for number in range(TRIES):
        place = bench.folder / f"{task} {seed} {number}"
        moment = draw(generator, len(work))
        outcome = bench.run(task, place, moment)
        case = f"{task}, seed {seed}: {moment} of {work[moment.rank]}"
        assert not outcome.hung, f"{case}\nranks that were left hang:\n{outcome.words}"
        if outcome.statuses[moment.rank] == -signal.SIGKILL:
            return case, place
        assert set(outcome.statuses) == {0}, f"{case}\n{outcome.words}"
        shutil.rmtree(place)
    raise AssertionError(f"{task}, seed {seed}: none of {TRIES} moments came in time")


def check_left(task: str, place: Path, reference: Path, case: str) -> int | None:
    """What a killed job left is whole, or does not look so; returns the latest whole step."""
    output = TASKS[task].output
    left, expected = place / "work" / output, reference / "work" / output
    assert len(leftovers(place / "work")) <= 3, f"{case}\n{leftovers(place / 'work')}"
    if task in TRAINED:
        checkpoints = left / "checkpoint"
        assert broken_steps(checkpoints) == [], case
        for step in whole_steps(checkpoints):
            verify_step(step_folder(checkpoints, step))
        return latest_whole_step(checkpoints)
    if task != "calibrate" and left.exists():
        assert digests(left, place / "work") == digests(expected, reference / "work"), case
    return None


def leftovers(folder: Path) -> list[Path]:
    """Files and folders with the names that are given while writing."""
    return [*folder.rglob(".*.tmp"), *folder.rglob(".*.old"), *folder.rglob("tmp-*")]


def check_resumed(words: str, latest: int | None, case: str) -> None:
    """The job went on from the step that it had to."""
    if latest is None:
        assert "training starts at step 1" in words, f"{case}\n{words}"
    else:
        assert f"/step-{latest}\n" in words, f"{case}\n{words}"
        assert latest == STEPS or f"training starts at step {latest + 1}" in words, case


def check_losses(place: Path, reference: Path, latest: int | None, case: str) -> None:
    """Every loss that was written is the undisturbed run's."""
    ours, theirs = losses(place / "work/run"), losses(reference / "work/run")
    assert sorted(theirs) == list(range(1, STEPS + 1))
    assert ours == {step: theirs[step] for step in ours}, case
    assert set(ours) >= set(range((latest or 0) + 1, STEPS + 1)), case


def losses(run: Path) -> dict[int, float]:
    """The loss by step, of all starts; a killed one may have none in its file."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tag, values = "loss_metrics/global_avg_loss", {}
    for folder in sorted((run / "tb").iterdir()):
        events = EventAccumulator(str(folder))
        events.Reload()
        if tag in events.Tags()["scalars"]:
            values |= {event.step: event.value for event in events.Scalars(tag)}
    return values
