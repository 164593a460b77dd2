"""Learning-rate schedules: warm-up, then decay at once, or a stable phase and then decay (WSD).

The curve is torchtitan's. With W steps of warm-up, N in all and D of decay, step s (from 0) trains
at `lr` times

    (s + 1) / W                    s < W
    1                              W ≤ s ≤ N − D
    m + (1 − m) f((s − N + D) / D)   N − D < s < N;   f(p) = 1 − p, 1 − sqrt(p), (1 + cos πp) / 2

with m `lr_scheduler.min_lr_factor`. D is N − W, or with `lr_scheduler.decay_ratio`
round(N · decay_ratio), which makes WSD (arXiv 2404.06395). N is `training.steps`, or
`lr_scheduler.total_steps` for a run that stops before its schedule ends. A warm-up longer than N is
cut to N. The factor never quite reaches m: step N would, but N − 1 is the last.
"""

import flame.process.titan_cpu  # noqa: F401  (must precede torchtitan)

# isort: split
from collections.abc import Mapping
from typing import Any

from torchtitan.components.lr_scheduler import LRSchedulersContainer, build_lr_schedulers

from flame.errors import UserError

DECAYS = ("linear", "sqrt", "cosine")


class Schedules(LRSchedulersContainer):
    """torchtitan's container with rates that follow the recipe and the step only.

    torchtitan restores the saved run's peak and last rate, so a new `optimizer.lr` would have no
    effect and a new `training.steps` only after one step.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the step; call `apply` before the next one.

        Raises:
            UserError: the step is no count.
        """
        step = counted(state_dict, "last_epoch")
        for scheduler in self.schedulers:
            scheduler.last_epoch, scheduler._step_count = step, step + 1

    def apply(self) -> None:
        """Set the optimizers to the rate of the next step."""
        for scheduler in self.schedulers:
            rates = [
                base * factor(scheduler.last_epoch)
                for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
            ]
            for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            scheduler._last_lr = rates


def counted(state: Mapping[str, Any], name: str) -> int:
    """Return the count `name` of a loaded state; raise UserError if it is none."""
    value = state.get(name)
    if type(value) is not int or value < 0:
        raise UserError(f"the checkpoint's {name} is {value!r}, not a count: use another step")
    return value


def build_schedules(optimizers: Any, config: Any, training_steps: int) -> Schedules:
    """Build the schedule of recipe section `[lr_scheduler]` for all parameter groups."""
    titan = build_lr_schedulers(optimizers, config, training_steps)
    return Schedules(optimizers, titan.schedulers[0].lr_lambdas[0])


def check_schedule(config: Any, training_steps: int) -> None:
    """Raise UserError if recipe section `[lr_scheduler]` makes no schedule for so many steps."""
    if config.warmup_steps < 0:
        raise UserError(f"lr_scheduler.warmup_steps is {config.warmup_steps}: at least 0")
    if config.decay_type not in DECAYS:
        raise UserError(
            f"lr_scheduler.decay_type is {config.decay_type!r}: choose from {', '.join(DECAYS)}"
        )
    _check_share("decay_ratio", 0.0 if config.decay_ratio is None else config.decay_ratio)
    _check_share("min_lr_factor", config.min_lr_factor)
    total = training_steps if config.total_steps is None else config.total_steps
    warmup, decay = min(config.warmup_steps, total), round(total * (config.decay_ratio or 0.0))
    if warmup + decay > total:
        raise UserError(
            f"lr_scheduler.decay_ratio is {config.decay_ratio}: {decay} steps of decay after "
            f"{warmup} of warm-up are more than {total}, lower one of them"
        )
    # Past its end the cosine curve would rise again, and the linear one fall below 0.
    if config.total_steps is not None and config.total_steps < training_steps:
        raise UserError(
            f"lr_scheduler.total_steps is {config.total_steps}, and training.steps "
            f"{training_steps}: the schedule must not end before the training"
        )


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise UserError(f"lr_scheduler.{name} is {value}: it must lie from 0 to 1")
