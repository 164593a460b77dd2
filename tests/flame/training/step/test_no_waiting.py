"""The host gives the device a step's work before it looks at what came of the step before."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import run_distributed
from tests.flame.jobs import make_job
from tests.flame.training.step.stand_in_device import recording

STEPS = 5


def events_of(assets: Path, out: Path, options: dict[str, Any], curious: bool) -> list[Any]:
    """What a job does on a stand-in device; a curious one looks at each micro-batch's loss."""
    import flame.register  # noqa: F401
    from flame.process.stop_signals import StopSignals
    from flame.training.trainer import Trainer

    trainer = Trainer(make_job(assets, out, checkpoint__interval=100, **options))
    if curious:
        forward_backward = trainer.forward_backward_step

        def looked_at(**batch: Any) -> torch.Tensor:
            losses = forward_backward(**batch)
            assert float(losses[0]) > 0
            return losses

        trainer.forward_backward_step = looked_at
    try:
        with recording(trainer) as device:
            trainer._steps(StopSignals(), [])
    finally:
        trainer.close()
    return device.events


def between(events: list[Any]) -> dict[int, list[Any]]:
    """What happens from the first launch of each step to that of the next one."""
    starts = [number for number, (kind, _) in enumerate(events) if kind == "launch"]
    assert [events[start][1] for start in starts] == list(range(1, STEPS + 1))
    pairs = zip(starts, starts[1:], strict=False)
    return {events[start][1]: events[start + 1 : end] for start, end in pairs}


@pytest.mark.parametrize("world_size", [1, 2])
def test_no_step_is_waited_for_before_the_next_is_launched(
    assets: Path, two_ranks: Path, tmp_path: Path, world_size: int
) -> None:
    """A teacher, its hidden states, four micro-batches of a step on each process."""
    options = {
        "training__steps": STEPS,
        "training__local_batch_size": 2 // world_size,
        "data__varlen": False,
        "distill__teacher": str(two_ranks),
        "distill__hidden_weight": 0.5,
        "metrics__enable_tensorboard": False,
    }
    found = run_distributed(events_of, world_size, assets, tmp_path / "run", options, False)
    for events in found:
        # The step that is read is the one before; the first looks at what gradients reach.
        assert between(events) == {1: [], 2: [("late", 1)], 3: [("late", 2)], 4: [("late", 3)]}


def test_a_host_that_looks_at_a_loss_is_found_out(assets: Path, tmp_path: Path) -> None:
    options = {"training__steps": STEPS, "data__varlen": False}
    (events,) = run_distributed(events_of, 1, assets, tmp_path / "run", options, True)
    waits = [what for kind, what in between(events)[3] if kind == "wait"]
    assert len(waits) == 4
    assert all("_local_scalar_dense in flame/training/trainer.py" in what for what in waits)
