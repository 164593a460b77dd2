"""Counting and logging each step when the device has the work of the next one."""

import time
from typing import Any

from flame.process.distributed import world_size
from flame.training.step.figures import Figures, Launched
from flame.training.step.nonfinite_steps import NonfiniteSteps

LOSS_PARTS = ("cross_entropy", "kl", "hidden")
"""Parts of the loss, which TensorBoard shows as `loss/…`."""


class LateReader:
    """Reads the figures of training steps, each under its own number.

    Args:
        monitor: torchtitan's `MetricsProcessor`.
        nonfinite: counts the steps that are not finite.
    """

    def __init__(self, monitor: Any, nonfinite: NonfiniteSteps) -> None:
        self.monitor, self.nonfinite = monitor, nonfinite
        self.figures: Figures | None = None
        """Of the step that was read last."""
        self._launched: Launched | None = None

    def follow(self, launched: Launched) -> None:
        """Read the step before `launched`, which waits until it is followed or `read` is called.

        Raises:
            UserError: as `read`, of the step before.
        """
        self.read()
        self._launched = launched

    def read(self) -> None:
        """Wait for the last step, if it has not been read; count and log it.

        Raises:
            UserError: it is one too many in a row that is not finite.
        """
        launched, self._launched = self._launched, None
        if launched is None:
            return
        self.figures = launched.read()
        self.monitor.data_loading_times.append(launched.taken.seconds)
        self.monitor.ntokens_since_last_log += launched.tokens // world_size()
        self.nonfinite.count(launched.step, self.figures.finite)
        if self.figures.finite and self.monitor.should_log(launched.step):
            self._log(launched, self.figures)

    def _log(self, launched: Launched, figures: Figures) -> None:
        """Write a step's metrics to the terminal and TensorBoard."""
        monitor = self.monitor
        # Time counts until the device had done the step; reading it later costs none.
        monitor.time_last_log += time.perf_counter() - launched.ended
        tokens = monitor.ntokens_since_last_log * world_size()
        extra = {
            "n_tokens_seen": launched.tokens_seen,
            "lr": launched.rate,
            "tokens_per_second": tokens / (time.perf_counter() - monitor.time_last_log),
            "skipped_steps": self.nonfinite.total,
        }
        total, *parts = figures.losses
        extra |= {f"loss/{name}": part for name, part in zip(LOSS_PARTS, parts, strict=True)}
        norm = figures.gradient_norm
        monitor.log(launched.step, total, figures.worst, norm, extra_metrics=extra)
        monitor.time_last_log = launched.ended
