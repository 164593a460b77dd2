"""Training losses: read from the TensorBoard files of a run, smoothed and drawn."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from flame.errors import UserError
from launch.drawing.lines import Line, line_chart

LOSS_TAG = "loss_metrics/global_avg_loss"
"""torchtitan's TensorBoard tag of the mean loss over all ranks, in nats per token."""


def loss_curve(run_folder: Path) -> tuple[list[int], list[float]]:
    """Return the steps of a run and their mean training losses, in nats per token.

    A resumed run has several files; where they overlap, the newest value counts.

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


def loss_chart(
    heading: str,
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    colour: Callable[[str], str],
) -> str:
    """Return an SVG of losses by step: each model's running mean, with its losses behind.

    Args:
        heading: what was trained, for readers that do not see the picture.
        curves: steps and losses by model.
        colour: gives the role of a model's colour.
    """
    lines = [
        Line(colour(name), name, steps, smoothed(losses, len(losses) // 20), faint=losses)
        for name, (steps, losses) in curves.items()
    ]
    return line_chart(lines, "step", "loss, nats per token", f"Training loss: {heading}")


def smoothed(values: Sequence[float], reach: int) -> list[float]:
    """Return means over `reach` neighbours on either side, of finite values only.

    Windows shrink evenly at the start, where a loss is steep, and are cut off at the end.
    """
    result = []
    for middle in range(len(values)):
        first = middle - min(reach, middle)
        window = [v for v in values[first : 2 * middle - first + 1] if math.isfinite(v)]
        result.append(sum(window) / len(window) if window else math.nan)
    return result
