"""Training losses of a run, from its TensorBoard files."""

import math
from pathlib import Path

from flame.errors import UserError

LOSS_TAG = "loss_metrics/global_avg_loss"
"""torchtitan's TensorBoard tag of the mean loss over all ranks, in nats per token."""


def loss_curve(run_folder: Path) -> tuple[list[int], list[float]]:
    """Steps and mean training losses, in nats per token, of a run.

    A resumed run has several files; where they overlap, the newest holds.

    Raises:
        UserError: the run has no events with a loss.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    losses: dict[int, tuple[float, float]] = {}
    for folder in sorted({file.parent for file in Path(run_folder).glob("tb/**/events.out.*")}):
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
        if LOSS_TAG in events.Tags()["scalars"]:
            for event in events.Scalars(LOSS_TAG):
                newest = losses.get(event.step, (-math.inf, 0.0))
                losses[event.step] = max(newest, (event.wall_time, event.value))
    if not losses:
        raise UserError(f"{run_folder} has no loss curve: no TensorBoard events with {LOSS_TAG}")
    steps = sorted(losses)
    return steps, [losses[step][1] for step in steps]
