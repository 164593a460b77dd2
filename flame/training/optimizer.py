"""Adam and AdamW for sharded models."""

import flame.process.titan_cpu  # noqa: F401  (must precede torchtitan)

# isort: split
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torchtitan.components.optimizer import OptimizersContainer

from flame.errors import UserError

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "Adam": torch.optim.Adam,
    "AdamW": torch.optim.AdamW,
}


class GroupedOptimizers(OptimizersContainer):
    """torchtitan's optimizer container over parameter groups.

    A group has one weight decay and one kind of tensor, since fused and foreach kernels cannot take
    DTensors and plain tensors together.
    """

    def __init__(
        self, model: nn.Module, cls: type[torch.optim.Optimizer], options: dict[str, Any]
    ) -> None:
        groups = parameter_groups(model, options["weight_decay"])
        self.model_parts = [model]
        self.optimizers = [cls(groups, **options)]
        self._post_init([p for group in groups for p in group["params"]], options)
        # The recipe's hyper-parameters, applied again after a checkpoint is loaded.
        self._given = [{**options, "weight_decay": group["weight_decay"]} for group in groups]
        self._reads_flag = options["fused"]

    def step_if(self, finite: Tensor) -> None:
        """Update the parameters if `finite`, a scalar, is 1; if it is 0, change nothing.

        Then parameters, moments and step counts stay as they are. A fused optimizer reads the flag
        on the device; the others make the host wait for it.
        """
        if self._reads_flag:
            (optimizer,) = self.optimizers
            # As torch's GradScaler sets it.
            optimizer.found_inf = 1 - finite
            self.step()
        elif bool(finite):
            self.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint's moments, but keep the recipe's hyper-parameters."""
        super().load_state_dict(state_dict)
        for group, given in zip(self.optimizers[0].param_groups, self._given, strict=True):
            group.update(given)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Group the trainable parameters by weight decay and by kind of tensor.

    The names in `model.no_weight_decay_names`, if it has any, get no decay.
    """
    exempt: set[str] = getattr(model, "no_weight_decay_names", set())
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[name in exempt, isinstance(parameter, DTensor)].append(parameter)
    return [
        {"params": parameters, "weight_decay": 0.0 if no_decay else weight_decay}
        for (no_decay, _), parameters in sorted(groups.items())
    ]


def build_optimizers(model_parts: list[nn.Module], config: Any, *_: Any) -> GroupedOptimizers:
    """Build the optimizer of recipe section `[optimizer]` for the only model part.

    Raises:
        UserError: the optimizer is unknown, or `early_step_in_backward` is set.
    """
    if config.name not in OPTIMIZERS:
        raise UserError(f"unknown optimizer {config.name!r}: choose from {', '.join(OPTIMIZERS)}")
    if config.early_step_in_backward:
        raise UserError("optimizer.early_step_in_backward is not supported: leave it false")
    options = {
        "lr": config.lr,
        "betas": (config.beta1, config.beta2),
        "eps": config.eps,
        "weight_decay": config.weight_decay,
        "fused": config.implementation == "fused",
        "foreach": config.implementation == "foreach",
    }
    return GroupedOptimizers(model_parts[0], OPTIMIZERS[config.name], options)
