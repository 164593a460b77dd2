"""Adam and AdamW for sharded models, and clipping of their gradients."""

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


@torch.no_grad()
def clip_gradients(parameters: list[nn.Parameter], max_norm: float) -> Tensor:
    """Scale the gradients to a global 2-norm of at most `max_norm`; return the norm before.

    Sharded and replicated parameters are taken together. A replicated gradient is the same on every
    rank and counts once.
    """
    with_gradient = [p for p in parameters if p.grad is not None]
    sharded = [p for p in with_gradient if isinstance(p.grad, DTensor)]
    replicated = [p for p in with_gradient if not isinstance(p.grad, DTensor)]
    norms = [_norm(part) for part in (sharded, replicated) if part]
    total = torch.linalg.vector_norm(torch.stack(norms))
    for part in (sharded, replicated):
        if part:
            torch.nn.utils.clip_grads_with_norm_(part, max_norm, total, foreach=True)
    return total


def _norm(parameters: list[nn.Parameter]) -> Tensor:
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters], foreach=True)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
