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

    Raises:
        UserError: the run has no events with a loss.
    """
    losses = curve(run_folder, LOSS_TAG)
    if not losses:
        raise UserError(f"{run_folder} has no loss curve: no TensorBoard events with {LOSS_TAG}")
    return list(losses), list(losses.values())


def curve(run_folder: Path, tag: str) -> dict[int, float]:
    """Return a TensorBoard curve of a run by step, in order; empty if there is none called `tag`.

    A resumed run has several files; where they overlap, the newest value counts.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[int, tuple[float, float]] = {}
    for folder in sorted({file.parent for file in Path(run_folder).glob("tb/**/events.out.*")}):
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
        if tag in events.Tags()["scalars"]:
            for event in events.Scalars(tag):
                newest = found.get(event.step, (-math.inf, 0.0))
                found[event.step] = max(newest, (event.wall_time, event.value))
    return {step: found[step][1] for step in sorted(found)}


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
