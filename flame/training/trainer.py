"""torchtitan's trainer for Hugging Face models, with this project's checkpoints and losses."""

import flame.process.titan_cpu  # noqa: F401  (must precede torchtitan)

# isort: split
import logging
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.distributed import utils as dist_utils
from torchtitan.train import Trainer as TitanTrainer

from flame.checkpoint.manager import CheckpointManager
from flame.config import writing_nothing
from flame.errors import UserError
from flame.models.document_bounds import remember
from flame.process.collective_timeout import naming_hung_ranks
from flame.process.distributed import gather_objects, world_size
from flame.process.stop_signals import StopSignals
from flame.recovery.lora import trained_tensors
from flame.recovery.reached import check_reached, trained_entries
from flame.training.micro_batch import with_micro_batch
from flame.training.objective import build_objective
from flame.training.schedule import counted
from flame.training.step.batches import (
    DataEndError,
    DataError,
    StepBatches,
    StopRequestedError,
    take_batches,
)
from flame.training.step.figures import Launched, agreed
from flame.training.step.gradients import (
    clip_gradients,
    reducing,
    replicated,
    sum_replicated_gradients,
)
from flame.training.step.late_reader import LateReader
from flame.training.step.nonfinite_steps import NonfiniteSteps
from flame.training.step.seeds import seed_step
from flame.training.train_spec import profilers, register, training_dtype
from flame.training.validation import Validation

log = logging.getLogger(__name__)


class Trainer(TitanTrainer):
    """One training job: build, resume or start, train, save.

    It differs from torchtitan's in that the model is a Hugging Face module, checkpoints are those
    of `flame.checkpoint.manager`, gradients of parameters that FSDP2 does not shard are summed, the
    count of seen tokens is global, a step that is not finite changes nothing, a signal ends the
    loop after the current step, and the host never waits for a step before it has launched the
    next, unless that is to save or to validate.
    """

    ntokens_seen: int

    def __init__(self, job: Any) -> None:
        register()
        super().__init__(with_micro_batch(writing_nothing(job), world_size()))
        self.job_config = job
        model = self.model_parts[0]
        self.objective = build_objective(job, model, training_dtype(job))
        self.validation = Validation(job, model, self.tokenizer, self._to_device)
        self.stop_asked, self.first_step = False, 1
        self.signals = StopSignals()
        checkpoints = Path(job.job.dump_folder) / job.checkpoint.folder
        state = {"optimizer": self.optimizers, "lr_scheduler": self.lr_schedulers}
        self.checkpointer = CheckpointManager(
            checkpoints,
            model,
            {**state, "train_state": self},
            self.dataloader,
            interval=job.checkpoint.interval,
            keep=job.checkpoint.keep_latest_k,
            first_step=job.checkpoint.enable_first_step_checkpoint,
            background=job.checkpoint.async_mode == "async",
            patience=timedelta(seconds=job.comm.train_timeout_seconds),
            tensors=trained_tensors if job.lora.rank > 0 else get_model_state_dict,
        )
        self.nonfinite = NonfiniteSteps(
            job.training.max_nonfinite_steps, checkpoints, self.checkpointer.settle
        )
        self.reader = LateReader(self.metrics_processor, self.nonfinite)

    def forward_backward_step(
        self, *, input_dict: dict[str, Tensor], labels: Tensor, global_valid_tokens: Any
    ) -> Tensor:
        """Run one micro-batch forward and backward; return its losses `[4]`.

        They are the total, cross entropy, KL and hidden distance, each summed over this rank's
        tokens and divided by `global_valid_tokens`, so that their sum over ranks is a mean.
        """
        losses = self.objective(input_dict, labels)
        (losses.total / global_valid_tokens).backward()
        parts = [losses.total.detach(), losses.cross_entropy, losses.kl, losses.hidden]
        return torch.stack(parts) / global_valid_tokens

    def next_batches(self) -> StepBatches:
        """Return what the next step trains on. Collective; raises what `take_batches` does."""
        stop = self.signals.received > 0 and self.step >= self.first_step
        return take_batches(self.dataloader, self.gradient_accumulation_steps, stop)

    def train_step(self, taken: StepBatches) -> None:
        """Train on `global_batch_size` sequences, and read the figures of the step before.

        The step changes weights and moments only if its losses and norm are finite. Collective.
        """
        self.reader.follow(self._launch(taken))

    def load(self) -> None:
        """Load the step that the job goes on from, if any; write nothing. Collective.

        Raises:
            UserError: the step is damaged, or holds something else than this job saves.
        """
        self.checkpointer.load(step=self.job_config.checkpoint.load_step)
        self.lr_schedulers.apply()

    def train(self) -> None:
        """Train to `training.steps`, the data's end or a signal; save the last step. Collective.

        Raises:
            SystemExit: a signal ended training; the status is 128 + its number, as in a shell.
        """
        events = MetricsProcessor(self.job_config, self.parallel_dims)
        self.metrics_processor.logger = events.logger
        log.info("training starts at step %d", self.step + 1)
        # Building and loading must not count as time of the first step.
        self.metrics_processor.time_last_log = time.perf_counter()
        with StopSignals() as signals, profilers(self.job_config, self.step) as running:
            self._steps(signals, running)
        if self.stop_asked:
            log.info("stopped after step %d, which is saved: the same command goes on", self.step)
            raise SystemExit(128 + (signals.received or signal.SIGTERM))

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "skipped_steps": self.nonfinite.total}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.step = counted(state_dict, "step")
        self.ntokens_seen = counted(state_dict, "ntokens_seen")
        self.nonfinite.total = counted(state_dict, "skipped_steps")

    def close(self) -> None:
        if self.dataloader is not None:
            self.dataloader.close()
        super().close()

    def _steps(self, signals: StopSignals, running: list[Any]) -> None:
        self.signals = signals
        first, last = self.step + 1, self.job_config.training.steps
        self.first_step = first
        failure: DataError | None = None
        try:
            while self.step < last:
                with naming_hung_ranks(self.step + 1):
                    taken = self.next_batches()
                self.step += 1
                self._step(taken)
                for profiler in running:
                    profiler.step()
                if self.step == first:
                    self._shorten_timeouts()
            with naming_hung_ranks(self.step):
                self.stop_asked = any(gather_objects(signals.received > 0))
        except StopRequestedError:
            self.stop_asked = True
        except (DataEndError, DataError) as error:
            log.warning("the data ended before step %d", self.step + 1)
            failure = error if isinstance(error, DataError) else None
        self.reader.read()
        if self.step >= first:
            self._save(last_step=True)
        if failure is not None:
            saved = f"; step {self.step} is saved" if self.step >= first else ""
            raise UserError(f"{failure}{saved}") from failure

    def _step(self, taken: StepBatches) -> None:
        """Train step `self.step`, then save and validate if it is time."""
        self.gc_handler.run(self.step)
        with naming_hung_ranks(self.step):
            self.train_step(taken)
        if not (self.checkpointer.due(self.step) or self.validation.due(self.step)):
            return
        self.reader.read()
        # Weights after which steps are not finite may be the cause: do not save them.
        if not self.nonfinite.in_a_row:
            self._save()
            with naming_hung_ranks(self.step):
                self.validation.log_if_due(self.step, self.metrics_processor)

    def _launch(self, taken: StepBatches) -> Launched:
        """Give the device the work of step `self.step`; the host waits for none of it."""
        training, (model,) = self.job_config.training, self.model_parts
        self.optimizers.zero_grad()
        seed_step(self.job_config.debug.seed or 0, self.step)
        tokens, when = max(taken.all_tokens, 1), self.job_config.parallelism.reduce_gradients
        losses = [
            self._micro_step(inputs, labels, tokens)
            for inputs, labels in reducing(model, taken.batches, when)
        ]
        if self.step == self.first_step:
            check_reached(model, *trained_entries(self.job_config))
        parameters = [p for p in model.parameters() if p.requires_grad]
        sum_replicated_gradients(replicated(parameters))
        norm = clip_gradients(parameters, training.max_norm)
        figures = agreed(torch.stack(losses).sum(dim=0), norm, tokens / max(taken.tokens, 1))
        self.optimizers.step_if(figures[-1])
        rate = self.lr_schedulers.schedulers[0].get_last_lr()[0]
        self.lr_schedulers.step()
        trained = training.global_batch_size * training.seq_len
        self.ntokens_seen += trained
        return Launched(self.step, rate, taken, trained, self.ntokens_seen, figures)

    def _save(self, last_step: bool = False) -> None:
        with naming_hung_ranks(self.step):
            self.checkpointer.save(self.step, last_step)

    def _shorten_timeouts(self) -> None:
        """Set `comm.train_timeout_seconds`: after the first step nothing is compiled any more."""
        seconds = self.job_config.comm.train_timeout_seconds
        dist_utils.set_pg_timeouts(timedelta(seconds=seconds), self.parallel_dims)

    def _micro_step(self, inputs: dict[str, Any], labels: Tensor, tokens: float) -> Tensor:
        return self.forward_backward_step(
            input_dict={k: remember(self._to_device(v), v) for k, v in inputs.items()},
            labels=self._to_device(labels),
            global_valid_tokens=tokens,
        )

    def _to_device(self, value: Any) -> Any:
        return value.to(self.device, non_blocking=True) if isinstance(value, Tensor) else value
