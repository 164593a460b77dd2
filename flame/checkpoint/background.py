"""Saving steps while training goes on: a copy in host memory, written by a thread.

The thread's collectives run on a group of its own over gloo: they never meet those of training.
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

from flame.checkpoint.steps import save_step


class BackgroundSaver:
    """Saves one step at a time in the background. `start` and `wait` are collective.

    Args:
        patience: how long the threads of the ranks wait for each other.
    """

    def __init__(self, patience: timedelta) -> None:
        self._group = _own_group(patience)
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
        """Copy `state_dict` to host memory and save it as `save_step` would, in the background.

        Args:
            state_dict, folder, step, extra_files: as `flame.checkpoint.steps.save_step` takes them.
            done: called when the step is whole.

        Raises:
            UserError: the step before could not be saved.
        """
        self.wait()
        staged = self._stager.stage(_flat(state_dict))

        def save() -> None:
            save_step(staged, folder, step, extra_files, self._group)
            done()

        self._running = self._worker.submit(save)

    def wait(self) -> None:
        """Wait for the step in flight; raise what went wrong with it."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def settle(self) -> None:
        """Let the step in flight be written; what goes wrong with it is for `wait` to raise."""
        if self._running is not None:
            wait([self._running])

    def close(self) -> None:
        """Let the step in flight be written; what goes wrong with it is not raised any more."""
        self._worker.shutdown(wait=True)


def _own_group(patience: timedelta) -> dist.ProcessGroup | None:
    if not (dist.is_available() and dist.is_initialized()):
        return None
    return dist.new_group(backend="gloo", timeout=patience)


def _flat(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """`state_dict` with the states of its parts, which only the training thread may ask for."""
    return {
        name: value.state_dict() if isinstance(value, Stateful) else value
        for name, value in state_dict.items()
    }
