"""A killed `apply` leaves no output, or a whole one, and is simply run again: at every operation.

Some moments of it are among those of `tests/faults/test_kills.py`, in the fast part.
"""

import multiprocessing
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from flame.checkpoint.reference import resolve
from flame.checkpoint.steps import verify_step
from pruning import apply
from pruning.methods import METHODS
from pruning.planning.choose import Budget, choose
from pruning.planning.plan_file import plan_text
from tests.pruning.models import DELTA_NET, weights, write_run

_FORKSERVER = multiprocessing.get_context("forkserver")
_FORKSERVER.set_forkserver_preload(["torch", "flame.register", "pruning.transform.write"])
_WATCHED = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")


def _apply(arguments: list[str]) -> None:
    options = apply.STAGE.parse(arguments)
    apply.check(options)
    apply.run(options)


def _die_at_operation(arguments: list[str], folder: Path, number: int) -> None:
    """Apply, and die just before the `number`-th operation on a file beside the output."""
    torch.set_num_threads(1)
    seen = 0

    def on_event(event: str, values: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in _WATCHED and str(folder) in str(values[0]):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(on_event)
    _apply(arguments)


def _round(folder: Path, model: Path, plan: Path, number: int, to: str) -> bool:
    """Kill an `apply` and run it again; whether it was killed before its end."""
    folder.mkdir()
    out = folder / "out"
    arguments = [str(model), str(plan), str(out), "--to", to]
    process = _FORKSERVER.Process(target=_die_at_operation, args=(arguments, folder, number))
    process.start()
    process.join(300)
    assert process.exitcode in (0, -signal.SIGKILL)
    assert not out.exists() or _is_whole(out, to)
    _apply([*arguments, "--overwrite"])
    assert _is_whole(out, to) and os.listdir(folder) == ["out"]
    return process.exitcode != 0


def _is_whole(out: Path, to: str) -> bool:
    reference = resolve(out)
    if to == "dcp":
        verify_step(reference.weights)
    source = reference.source()
    return all(source.read(name).isfinite().all() for name in source.names())


@pytest.fixture(scope="module")
def model_and_plan(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("model")
    model = write_run(folder / "model", DELTA_NET, weights(DELTA_NET))
    reference = resolve(model)
    budget = Budget(0.5)
    plan = choose(reference.config, reference.source(), METHODS["l1"](), budget)
    (folder / "plan.json").write_text(plan_text(plan))
    return model, folder / "plan.json"


@pytest.mark.slow
@pytest.mark.parametrize("to", ["dcp", "hf"])
def test_an_apply_killed_before_any_file_operation_is_run_again(
    model_and_plan: tuple[Path, Path], tmp_path: Path, to: str
) -> None:
    number = 1
    while _round(tmp_path / str(number), *model_and_plan, number, to):
        number += 1
    # It went on to an apply that was not killed, and not at its first operations.
    assert 8 < number < 199
