"""torchtitan's trainer for causal language models, with this project's checkpoints."""

import flame.titan_cpu  # noqa: F401  (must precede torchtitan)

# isort: split
import copy
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.distributed import utils as dist_utils
from torchtitan.train import Trainer as TitanTrainer

import flame.spec
from flame.checkpoint.manager import CheckpointManager
from flame.lora import peft_name
from flame.objective import next_token_loss
from flame.optimizer import clip_gradients

log = logging.getLogger(__name__)


class Trainer(TitanTrainer):
    """One training job: build, resume or start, train, save.

    Differences to torchtitan's: the model is a Hugging Face module, checkpoints are
    `flame.checkpoint.manager`'s, gradients of parameters that FSDP2 does not shard are summed, and
    the count of seen tokens is global.
    """

    def __init__(self, job: Any) -> None:
        flame.spec.register()
        super().__init__(without_checkpoints(job))
        self.job_config = job
        model = self.model_parts[0]
        self.checkpointer = CheckpointManager(
            Path(job.job.dump_folder) / job.checkpoint.folder,
            model,
            {
                "optimizer": self.optimizers,
                "lr_scheduler": self.lr_schedulers,
                "train_state": self,
            },
            self.dataloader,
            interval=job.checkpoint.interval,
            keep=job.checkpoint.keep_latest_k,
            first_step=job.checkpoint.enable_first_step_checkpoint,
            tensors=trained_tensors if job.lora.rank > 0 else get_model_state_dict,
        )

    def forward_backward_step(
        self, *, input_dict: dict[str, Tensor], labels: Tensor, global_valid_tokens: Any
    ) -> Tensor:
        """Loss of one micro-batch, a scalar: this rank's share of the mean over all tokens."""
        losses = next_token_loss(self.model_parts[0], input_dict, labels)
        loss = losses / global_valid_tokens
        loss.backward()
        return loss

    def train_step(self, data_iterator: Any) -> None:
        """One optimizer step over `global_batch_size` sequences."""
        self.optimizers.zero_grad()
        learning_rate = self.lr_schedulers.schedulers[0].get_last_lr()[0]
        batches = [next(data_iterator) for _ in range(self.gradient_accumulation_steps)]
        local_tokens = sum(int((labels != IGNORE_INDEX).sum()) for _, labels in batches)
        global_tokens = self._sum(local_tokens)
        losses = [
            self.forward_backward_step(
                input_dict={key: self._to_device(value) for key, value in inputs.items()},
                labels=self._to_device(labels),
                global_valid_tokens=global_tokens,
            ).detach()
            for inputs, labels in batches
        ]
        parameters = [p for p in self.model_parts[0].parameters() if p.requires_grad]
        norm = clip_gradients(parameters, self.job_config.training.max_norm)
        self.optimizers.step()
        self.lr_schedulers.step()
        self.ntokens_seen = self._tokens_per_step() * self.step
        if self.metrics_processor.should_log(self.step):
            self._log(torch.stack(losses).sum(), local_tokens, global_tokens, norm, learning_rate)

    def train(self) -> None:
        """Train to `training.steps`; data that ends before is a last step too."""
        super().train()
        if self.step < self.job_config.training.steps:
            self.step -= 1
            self.checkpointer.save(self.step, last_step=True)

    def close(self) -> None:
        if self.dataloader is not None:
            self.dataloader.close()
        super().close()

    def _log(
        self, loss: Tensor, local_tokens: int, global_tokens: float, norm: Tensor, rate: float
    ) -> None:
        mean = self._sum(loss)
        worst = float(loss) * global_tokens / max(local_tokens, 1)
        if self.parallel_dims.dp_enabled:
            mesh = self.parallel_dims.get_optional_mesh("loss")
            worst = dist_utils.dist_max(torch.tensor(worst, device=self.device), mesh)
        self.metrics_processor.log(
            self.step,
            mean,
            worst,
            norm.item(),
            extra_metrics={"n_tokens_seen": self.ntokens_seen, "lr": rate},
        )

    def _sum(self, value: int | Tensor) -> float:
        """`value` summed over the data-parallel ranks."""
        tensor = torch.as_tensor(value, device=self.device)
        if not self.parallel_dims.dp_enabled:
            return float(tensor)
        return float(dist_utils.dist_sum(tensor, self.parallel_dims.get_optional_mesh("loss")))

    def _to_device(self, value: Any) -> Any:
        return value.to(self.device, non_blocking=True) if isinstance(value, Tensor) else value

    def _tokens_per_step(self) -> int:
        training = self.job_config.training
        return training.global_batch_size * training.seq_len


def without_checkpoints(job: Any) -> Any:
    """`job` with torchtitan's own checkpointer switched off."""
    job = copy.copy(job)
    job.checkpoint = copy.copy(job.checkpoint)
    job.checkpoint.enable = False
    return job


def trained_tensors(model: nn.Module) -> dict[str, Any]:
    """A LoRA run's checkpoint: the trained tensors under peft's names."""
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    tensors = get_model_state_dict(model)
    return {peft_name(name): value for name, value in tensors.items() if name in trained}
