"""Training that meets values that are not finite, and signals."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flame.errors import UserError
from tests.distributed import run_distributed
from tests.flame.jobs import (
    largest_difference,
    losses_of,
    make_job,
    scalars_of,
    tensors_of,
    train_job,
)

ROOT = Path(__file__).parents[3]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone"]


# Steps that are not finite ---------------------------------------------------------------------


def poisoned(assets: Path, out: Path, steps: tuple[int, ...], **overrides: Any) -> str:
    """Train while rank 1's loss is NaN in `steps`; return the error and the warnings."""
    from flame.training.trainer import Trainer

    forward_backward, said = Trainer.forward_backward_step, []

    def poison(trainer: Any, **batch: Any) -> torch.Tensor:
        losses = forward_backward(trainer, **batch)
        if int(os.environ["RANK"]) == 1 and trainer.step in steps:
            for parameter in trainer.model_parts[0].parameters():
                parameter.grad = parameter.grad * float("nan")
        return losses

    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("flame.training.step.nonfinite_steps").addHandler(handler)
    Trainer.forward_backward_step = poison  # type: ignore[method-assign]
    try:
        train_job(assets, out, **overrides)
    except UserError as error:
        said.append(str(error))
    finally:
        Trainer.forward_backward_step = forward_backward  # type: ignore[method-assign]
        logging.getLogger("flame.training.step.nonfinite_steps").removeHandler(handler)
    return "\n".join(said)


@pytest.fixture(scope="module")
def skipped(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose third of six steps was not finite."""
    run = tmp_path_factory.mktemp("skipped") / "run"
    said = run_distributed(poisoned, 2, assets, run, (3,), checkpoint__interval=1)
    assert said[0] == said[1]
    assert said[0].startswith("step 3 skipped: its loss or gradient norm is not finite (1 in a row")
    return run


def test_a_skipped_step_changes_nothing_but_the_schedule(skipped: Path) -> None:
    # The third step's own checkpoint is left out; the fourth holds one update more than the second.
    assert not (skipped / "checkpoint/step-3").exists()
    before, after = (tensors_of(skipped / f"checkpoint/step-{n}") for n in (2, 4))
    counts = "optimizer.state.lm_head.weight.step"
    assert (float(before[counts]), float(after[counts])) == (2, 3)
    assert all(torch.isfinite(value).all() for value in after.values())
    rates = scalars_of(skipped, "lr")
    assert sorted(rates) == [1, 2, 4, 5, 6]


def test_skipped_steps_are_counted_through_a_resume(
    assets: Path, skipped: Path, tmp_path: Path
) -> None:
    assert scalars_of(skipped, "skipped_steps") == {1: 0, 2: 0, 4: 1, 5: 1, 6: 1}
    run_distributed(poisoned, 2, assets, tmp_path / "run", (3,), training__steps=4)
    run_distributed(train_job, 2, assets, tmp_path / "run")
    assert scalars_of(tmp_path / "run", "skipped_steps")[6] == 1
    final = "checkpoint/step-6"
    assert largest_difference(skipped / final, tmp_path / "run" / final) == 0.0


def test_steps_that_are_read_late_come_to_the_same(
    assets: Path, skipped: Path, tmp_path: Path
) -> None:
    """Without a checkpoint that waits for it, a step is found not finite when the next is done."""
    run = tmp_path / "run"
    run_distributed(poisoned, 2, assets, run, (3,), checkpoint__interval=100)
    final = "checkpoint/step-6"
    assert largest_difference(skipped / final, run / final) == 0.0
    for tag in ("skipped_steps", "lr", "n_tokens_seen", "grad_norm"):
        assert scalars_of(run, tag) == scalars_of(skipped, tag)
    options = {"checkpoint__interval": 100, "training__max_nonfinite_steps": 2}
    errors = run_distributed(poisoned, 2, assets, tmp_path / "bad", (2, 4, 5), **options)
    assert "2 steps in a row, 4 to 5" in errors[0] and "last good checkpoint: none" in errors[0]
    assert not (tmp_path / "bad/checkpoint/step-6").exists()


def test_too_many_in_a_row_end_the_job(assets: Path, tmp_path: Path) -> None:
    options = {"checkpoint__interval": 1, "training__max_nonfinite_steps": 2}
    errors = run_distributed(poisoned, 2, assets, tmp_path / "run", (2, 4, 5), **options)
    assert errors[0] == errors[1]
    assert errors[0].splitlines()[-1] == (
        "loss or gradient norm not finite for 2 steps in a row, 4 to 5: lower optimizer.lr, or "
        f"look at the data (last good checkpoint: {tmp_path}/run/checkpoint/step-3)"
    )


def test_a_rate_that_is_far_too_high_ends_the_job(assets: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="3 steps in a row.*last good checkpoint: none"):
        run_distributed(
            train_job, 1, assets, tmp_path / "run", optimizer__lr=1e30, training__steps=9,
            training__max_nonfinite_steps=3, lr_scheduler__total_steps=9,
        )  # fmt: skip


# Signals ---------------------------------------------------------------------------------------


def signalled(assets: Path, out: Path, rank: int, step: int, **overrides: Any) -> int:
    """Train, with SIGTERM to one rank in the middle of a step; return the exit status."""
    from flame.training.trainer import Trainer

    forward_backward = Trainer.forward_backward_step

    def interrupt(trainer: Any, **batch: Any) -> torch.Tensor:
        if int(os.environ["RANK"]) == rank and trainer.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward_backward(trainer, **batch)

    Trainer.forward_backward_step = interrupt  # type: ignore[method-assign]
    try:
        train_job(assets, out, **overrides)
    except SystemExit as exit_:
        return int(exit_.code or 0)
    finally:
        Trainer.forward_backward_step = forward_backward  # type: ignore[method-assign]
    return 0


@pytest.mark.slow
def test_a_signal_to_one_rank_ends_all_after_the_step(
    assets: Path, two_ranks: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert run_distributed(signalled, 2, assets, run, 1, 2) == [143, 143]
    assert [path.name for path in (run / "checkpoint").glob("step-*")] == ["step-2"]
    run_distributed(train_job, 2, assets, run)
    final = "checkpoint/step-6"
    assert largest_difference(two_ranks / final, run / final) == 0.0
    assert losses_of(run) == losses_of(two_ranks)


@pytest.fixture(scope="module")
def long_job(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A recipe of 40 steps without a checkpoint on the way, and where it ends."""
    run = tmp_path_factory.mktemp("long") / "run"
    options = {
        "training__steps": 40, "lr_scheduler__total_steps": 40, "checkpoint__interval": 99
    }  # fmt: skip
    run_distributed(train_job, 2, assets, run, **options)
    return {"run": run, "options": options}


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("command", ["slimstate", "torchrun"])
def test_a_stopped_command_goes_on(
    assets: Path, tmp_path: Path, long_job: dict[str, Any], command: str, number: signal.Signals
) -> None:
    """The job and its rerun, each two processes, against the undisturbed run."""
    words = command_line(command, make_job(assets, tmp_path / "run", **long_job["options"]))
    process = subprocess.Popen(
        words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for(process, "step: 10 ")
    process.send_signal(number)
    out, err = process.communicate(timeout=600)
    assert "stopped after step" in out
    # torchrun ends with a status and words of its own.
    if command == "slimstate":
        assert (process.returncode, err) == (128 + number, "")
    assert process.returncode != 0
    (step,) = (tmp_path / "run/checkpoint").iterdir()
    assert 10 <= int(step.name.removeprefix("step-")) < 40
    run_distributed(train_job, 2, assets, tmp_path / "run", **long_job["options"])
    final = "checkpoint/step-40"
    assert largest_difference(long_job["run"] / final, tmp_path / "run" / final) == 0.0


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_one_stopped_process_says_so_by_its_status(assets: Path, tmp_path: Path) -> None:
    job = make_job(assets, tmp_path / "run", training__steps=400, lr_scheduler__total_steps=400)
    words = command_line("slimstate", job, nproc=1)
    process = subprocess.Popen(
        words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for(process, "step: 10 ")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=600)
    assert "stopped after step" in out
    assert (process.returncode, err) == (143, "")


def command_line(command: str, job: Any, nproc: int = 2) -> list[str]:
    from flame.recipe import recipe_text

    recipe = Path(job.job.dump_folder).with_suffix(".toml")
    recipe.write_text(recipe_text(job))
    options = ["--config", str(recipe)]
    if command == "slimstate":
        return [sys.executable, "-m", "launch.cli", "train", "--nproc", str(nproc), *options]
    return [
        sys.executable,
        *TORCHRUN,
        "--nproc-per-node",
        str(nproc),
        "-m",
        "flame.train",
        *options,
    ]


def wait_for(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"the job ended before it said {text!r}")


# Ranks that do not answer, nodes that do not share ----------------------------------------------


def hanging(assets: Path, out: Path, **overrides: Any) -> str:
    """Train while rank 1 sleeps through the timeout of step 2; return the error."""
    from flame.training.trainer import Trainer

    forward_backward = Trainer.forward_backward_step

    def sleep(trainer: Any, **batch: Any) -> torch.Tensor:
        if int(os.environ["RANK"]) == 1 and trainer.step == 2:
            time.sleep(12)
            raise UserError("slept")
        return forward_backward(trainer, **batch)

    Trainer.forward_backward_step = sleep  # type: ignore[method-assign]
    try:
        train_job(assets, out, **overrides)
    except UserError as error:
        return str(error)
    finally:
        Trainer.forward_backward_step = forward_backward  # type: ignore[method-assign]
    return ""


def test_a_rank_that_hangs_is_named(assets: Path, tmp_path: Path) -> None:
    errors = run_distributed(hanging, 2, assets, tmp_path / "run", comm__train_timeout_seconds=3)
    assert errors[0].startswith("rank 1 hangs: no answer in step 2 for ")
    assert errors[1] == "slept"


def as_two_nodes(folders: list[Path]) -> str:
    """Check for a shared folder as two nodes of one process each."""
    from flame.process import shared_folder

    os.environ["LOCAL_WORLD_SIZE"] = "1"
    shared_folder.PATIENCE = 0.5
    try:
        shared_folder.check_shared(folders[int(os.environ["RANK"])])
    except UserError as error:
        return str(error)
    return "shared"


def test_nodes_without_a_shared_folder_are_told(tmp_path: Path) -> None:
    one, other = tmp_path / "one/run", tmp_path / "other/run"
    assert run_distributed(as_two_nodes, 2, [one, one]) == ["shared", "shared"]
    errors = run_distributed(as_two_nodes, 2, [one, other])
    assert errors[0] == errors[1]
    assert re.fullmatch(
        rf"node \S+ does not see the run folder that rank 0 writes, {other}: put job.dump_folder "
        "on a file system of all nodes",
        errors[0],
    )
    assert not one.exists() and not other.exists()


# The handler by itself -------------------------------------------------------------------------


@pytest.fixture
def beat() -> Callable[[signal.Signals], None]:
    """Send a signal to this process."""
    return lambda number: os.kill(os.getpid(), number)


def test_requests_are_noted_and_handlers_come_back(beat: Callable[..., None]) -> None:
    from flame.process.stop_signals import StopSignals

    before = [signal.getsignal(kind) for kind in (signal.SIGTERM, signal.SIGINT)]
    with StopSignals() as signals:
        assert signals.received == 0
        beat(signal.SIGTERM)
        beat(signal.SIGTERM)
        assert signals.received == signal.SIGTERM
    assert [signal.getsignal(kind) for kind in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_second_ctrl_c_ends_at_once(
    beat: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    from flame.process import stop_signals

    monkeypatch.setattr(stop_signals, "ONE_KEYSTROKE", 0.05)
    with pytest.raises(KeyboardInterrupt), stop_signals.StopSignals() as signals:
        beat(signal.SIGINT)
        beat(signal.SIGINT)
        assert signals.received == signal.SIGINT
        time.sleep(0.1)
        beat(signal.SIGINT)


def test_only_the_second_ctrl_c_reaches_the_outer_wakeup(
    beat: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launcher's thread, which ends a process that hangs, must not see a request."""
    from flame.process import stop_signals

    monkeypatch.setattr(stop_signals, "ONE_KEYSTROKE", 0.05)
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    os.set_blocking(reading, False)
    before = signal.set_wakeup_fd(writing)
    try:
        with pytest.raises(KeyboardInterrupt), stop_signals.StopSignals():
            beat(signal.SIGINT)
            time.sleep(0.2)
            with pytest.raises(BlockingIOError):
                os.read(reading, 1)
            os.set_blocking(reading, True)
            beat(signal.SIGINT)
        assert os.read(reading, 1)[0] == signal.SIGINT
    finally:
        assert signal.set_wakeup_fd(before) == writing
        os.close(reading)
        os.close(writing)


def test_a_hybrid_that_mixes_packed_documents_is_one_line(assets: Path, tmp_path: Path) -> None:
    from flame.training.job_checks import check_job

    config = {"model_type": "bailing_hybrid", "vocab_size": 300, "hidden_size": 32}
    (tmp_path / "config.json").write_text(json.dumps(config))
    options = {"model__config": str(tmp_path / "config.json"), "data__varlen": True}
    job = make_job(assets, tmp_path / "run", **options)
    with pytest.raises(UserError, match="data.varlen .* 'bailing_hybrid'"):
        check_job(job, 1)
    assert not (tmp_path / "run").exists()
