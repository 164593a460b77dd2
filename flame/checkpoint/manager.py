"""Saving and resuming a training run, in the place of torchtitan's checkpointer.

It differs from torchtitan 0.2.2 in what could lose data: a step is written under a temporary name
with a hash for each file, and renamed when it is whole; purging counts whole steps only, so keeping
one is safe; the last step is saved in full; the loader's state is JSON and resumes at another world
size. A step has torchtitan's layout, plus `checksums.json` and `dataloader.json`.
"""

import json
import logging
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from flame.checkpoint.background import BackgroundSaver
from flame.checkpoint.save import save_step
from flame.checkpoint.steps import latest_whole_step, purge, step_folder
from flame.errors import UserError
from flame.process.distributed import (
    DEFAULT_TIMEOUT,
    barrier,
    from_rank_zero,
    gather_to_first,
    rank,
)
from flame.storage.json_file import read_object
from flame.storage.load_step import load_step

LOADER_FILE = "dataloader.json"
OPTIONAL = ("train_state.skipped_steps",)
"""Entries that may be missing, because earlier versions did not save them."""

log = logging.getLogger(__name__)


class CheckpointManager:
    """Saves steps of one run into `folder` and resumes from its latest whole step.

    Args:
        folder: the run's `checkpoint/`.
        model: the sharded model.
        states: stateful parts saved beside the model (`optimizer`, `lr_scheduler`, `train_state`).
        loader: the data loader, with `merge_states` and a `state_dict()` that fits into JSON.
        interval: steps between checkpoints.
        keep: how many whole steps to keep; 0 keeps all.
        first_step: save step 1 too.
        tensors: returns the model's tensors to be saved, by the names that they are saved under.
        background: save while training goes on, except the last step. One save runs at a time, and
            its error is raised when the next one begins.
        patience: how long ranks that save in the background wait for each other.
    """

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        states: dict[str, Any],
        loader: Any,
        *,
        interval: int,
        keep: int,
        first_step: bool = False,
        tensors: Callable[[nn.Module], dict[str, Any]] = get_model_state_dict,
        background: bool = False,
        patience: timedelta = DEFAULT_TIMEOUT,
    ) -> None:
        self.folder = folder
        self.model = model
        self.states = states
        self.loader = loader
        self.interval = interval
        self.keep = keep
        self.first_step = first_step
        self.tensors = tensors
        self.background = BackgroundSaver(patience) if background else None
        self._saved = -1

    def due(self, step: int) -> bool:
        """Whether `step` is one that is saved though it is not the last."""
        return step % self.interval == 0 or (step == 1 and self.first_step)

    @torch.no_grad()
    def save(self, curr_step: int, last_step: bool = False) -> None:
        """Save step `curr_step` if it is due or the last step. Collective."""
        if not (self.due(curr_step) or last_step):
            return
        if self.background is not None:
            self.background.wait()
        if self._saved == curr_step:
            return
        begin = time.monotonic()
        states = gather_to_first(self.loader.state_dict())
        position = self.loader.merge_states(states) if states is not None else {}
        files = {LOADER_FILE: json.dumps(position, sort_keys=True).encode()}
        if self.background is None or last_step:
            save_step(self._state_dict(), self.folder, curr_step, files)
            self._purge()
            barrier()
            text = "saved step %d in %.2f s"
        else:
            state = self._state_dict()
            self.background.start(state, self.folder, curr_step, files, self._purge)
            text = "copied step %d in %.2f s, to be saved"
        self._saved = curr_step
        log.info(text, curr_step, time.monotonic() - begin)

    @torch.no_grad()
    def load(self, step: int = -1) -> bool:
        """Load a step and return True, or return False if there is none to load. Collective.

        Step 0 holds a model alone, so training starts there with a fresh optimizer, schedule and
        data.

        `step` is its number, or -1 for the latest whole step, after old ones are purged. Raises
        `UserError` if the step does not exist, is damaged or does not fit the model.
        """
        if step == -1:
            self._purge()
            found = from_rank_zero(latest_whole_step(self.folder) if rank() == 0 else None)
            if found is None:
                return False
            step = found
        source = step_folder(self.folder, step)
        if not source.is_dir():
            raise UserError(f"checkpoint.load_step is {step}, but {source} does not exist")
        state = self.tensors(self.model) if step == 0 else self._state_dict()
        load_step(state, source, optional=OPTIONAL)
        if step > 0:
            missing = f"{source} has no {LOADER_FILE}: it is not a training checkpoint"
            self.loader.load_state_dict(read_object(source / LOADER_FILE, missing))
        log.info("loaded %s", source)
        self._saved = step
        return True

    def settle(self) -> None:
        """Wait until a running save is done, so that the folder shows it; raise nothing."""
        if self.background is not None:
            self.background.settle()

    def close(self) -> None:
        """Wait until a running save is done, and save no more in the background."""
        if self.background is not None:
            self.background.close()

    def _purge(self) -> None:
        if rank() == 0:
            purge(self.folder, self.keep)

    def _state_dict(self) -> dict[str, Any]:
        return {**self.tensors(self.model), **self.states}
