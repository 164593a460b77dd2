"""Saving steps while training goes on: a thread writes a copy that lies in host memory.

The thread's collectives run over gloo in their own group, so they never mix with those of training.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.staging import StateDictStager
from torch.distributed.checkpoint.stateful import Stateful

from flame.checkpoint.save import save_step


class BackgroundSaver:
    """Saves one step at a time in the background. `start` and `wait` are collective.

    Args:
        patience: how long the threads of the ranks wait for each other.
    """

    def __init__(self, patience: timedelta) -> None:
        several = dist.is_available() and dist.is_initialized()
        self._group = dist.new_group(backend="gloo", timeout=patience) if several else None
        self._stager = StateDictStager(pin_memory=torch.cuda.is_available())
        self._worker = ThreadPoolExecutor(1, "save")
        self._running: Future[None] | None = None

    def start(
        self,
        state_dict: Mapping[str, Any],
        folder: Path,
        step: int,
        extra_files: Mapping[str, bytes],
        done: Callable[[], None],
    ) -> None:
        """Copy `state_dict` to host memory, and let the thread save it as `save_step` does.

        The thread calls `done` when the step is whole. Raises `UserError` if the previous step was
        not saved.
        """
        self.wait()
        staged = self._stager.stage(_flat(state_dict))

        def save() -> None:
            save_step(staged, folder, step, extra_files, self._group)
            done()

        self._running = self._worker.submit(save)

    def wait(self) -> None:
        """Wait until a running save is done; raise its error if it failed."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def settle(self) -> None:
        """Wait until a running save is done; its error, if any, is left for `wait` to raise."""
        if self._running is not None:
            wait([self._running])

    def close(self) -> None:
        """Wait until a running save is done, and end the thread; an error is not raised."""
        self._worker.shutdown(wait=True)


def _flat(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Replace stateful parts by their states, which only the training thread may ask for."""
    return {
        name: value.state_dict() if isinstance(value, Stateful) else value
        for name, value in state_dict.items()
    }
