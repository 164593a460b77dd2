"""Counting the steps whose loss or gradient norm is not finite; too many in a row end the job."""

import logging
from collections.abc import Callable
from pathlib import Path

from flame.checkpoint.steps import step_folder, whole_steps
from flame.errors import UserError

log = logging.getLogger(__name__)


class NonfiniteSteps:
    """Counts steps that are not finite, and so made no update.

    Args:
        limit: this many in a row are an error (`training.max_nonfinite_steps`).
        checkpoints: the run's checkpoint folder; the error names the last step before them.
        settle: called before the error, waits until no checkpoint is being written.
    """

    def __init__(
        self, limit: int, checkpoints: Path, settle: Callable[[], None] = lambda: None
    ) -> None:
        self.limit = limit
        self.checkpoints = checkpoints
        self.settle = settle
        self.total = 0
        self.in_a_row = 0

    def count(self, step: int, finite: bool) -> None:
        """Count step `step`, which was `finite` or not.

        Raises:
            UserError: it is the `limit`-th in a row that is not finite.
        """
        self.in_a_row = 0 if finite else self.in_a_row + 1
        if finite:
            return
        self.total += 1
        log.warning(
            "step %d skipped: its loss or gradient norm is not finite (%d in a row, %d in all)",
            step,
            self.in_a_row,
            self.total,
        )
        if self.in_a_row >= self.limit:
            raise UserError(self._complaint(step))

    def _complaint(self, step: int) -> str:
        self.settle()
        first = step - self.in_a_row + 1
        good = [known for known in whole_steps(self.checkpoints) if known < first]
        last = step_folder(self.checkpoints, good[-1]) if good else "none"
        return (
            f"loss or gradient norm not finite for {self.in_a_row} steps in a row, {first} to "
            f"{step}: lower optimizer.lr, or look at the data (last good checkpoint: {last})"
        )
