"""What can be wrong with the recovery that a job asks for, found on a model without memory."""

import math
from typing import Any

from torch import nn

from flame.checkpoint.reference import resolve
from flame.errors import UserError
from flame.recovery.distill import check_distill
from flame.recovery.lora import check_targets
from flame.recovery.trainable import check_modules

BIASES = ("none", "all", "lora_only")


def check_recovery(job: Any, model: nn.Module, config: dict[str, Any]) -> None:
    """Raise `UserError` for the first option of `[lora]`, `[trainable]`, `[distill]` that is wrong.

    Args:
        model: the student on the meta device.
        config: its `config.json`.
    """
    if job.lora.rank > 0:
        _check_lora(job, model)
    elif job.lora.dora or job.lora.init:
        name = "dora" if job.lora.dora else "init"
        raise UserError(f"lora.{name} is set and lora.rank is 0: give a rank, 32 for one")
    check_modules(model, job.trainable.modules)
    check_distill(job, config)


def _check_lora(job: Any, model: nn.Module) -> None:
    lora = job.lora
    if job.trainable.modules:
        raise UserError(
            "trainable.modules and lora.rank are both set: name what is trained beside the "
            "adapters in lora.train_also"
        )
    if not (math.isfinite(lora.alpha) and lora.alpha > 0):
        raise UserError(f"lora.alpha is {lora.alpha}: it must be above 0")
    if not 0 <= lora.dropout < 1:
        raise UserError(f"lora.dropout is {lora.dropout}: it must be at least 0 and below 1")
    if lora.bias not in BIASES:
        raise UserError(f"lora.bias is {lora.bias!r}: choose from {', '.join(BIASES)}")
    if not lora.target_modules:
        raise UserError("lora.target_modules is empty: name a module, or set lora.rank to 0")
    check_targets(model, lora.target_modules)
    if lora.init and not resolve(lora.init).is_lora:
        raise UserError(f"lora.init {lora.init} holds no adapters: give it as --init")
