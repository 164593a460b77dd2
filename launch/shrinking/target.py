"""Where a shrinking leads: the model that it begins with, and what is to be left of it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from flame import train
from flame.checkpoint.reference import resolve
from flame.data.config import DataConfig
from flame.errors import UserError
from flame.hugging_face.outer_model import OuterModel
from flame.run_folder.origin import named_config
from launch.shrinking.schedule import Phase, Widths, even_steps, phases
from pruning.adapters import adapter_for
from pruning.adapters.interface import Config
from pruning.methods import Method
from pruning.planning.budgets import SQUARE, Budget
from pruning.planning.choose import check_budget
from pruning.planning.fitting import fitted
from pruning.planning.plan import spaces_of_kinds
from pruning.spaces import NOUNS


@dataclass(frozen=True)
class Target:
    data: DataConfig
    """What is trained on."""
    init: str | None
    """Reference of the model to begin with; None for one from scratch."""
    steps: int
    """Of the whole training."""
    budget: Budget
    """What was asked for."""
    sizes: Widths
    """Channels or heads of each kind in the model to begin with."""
    widths: Widths
    """What each kind keeps in the end."""

    @classmethod
    def of(cls, training: train.Options, budget: Budget, method: Method) -> "Target":
        """The target of a budget for the model that a recipe names.

        Raises:
            UserError: the recipe, the model or the budget cannot work, or adapters are trained,
                whose moments no pruning can carry over.
        """
        job = train.job_of(training)
        if job.lora.rank > 0:
            raise UserError(
                f"lora.rank is {job.lora.rank}: a shrinking prunes weights that have been trained "
                "with their moments, which adapters do not keep; train all weights, or those of "
                "trainable.modules (--lora.rank 0)"
            )
        init = job.model.init or None
        config, outer = _model(init, job.model.config)
        fit = fitted(budget, config, method, outer)
        widths = check_budget(fit, config, method)
        spaces = spaces_of_kinds(adapter_for(config), config, tuple(widths))
        sizes = {space.kind: space.head_dim for space in spaces}
        return cls(job.data, init, job.training.steps, budget, sizes, widths)

    def phases(self, at: Sequence[int], prunings: int) -> list[Phase]:
        """The phases that lead here, with channels going `at` these steps or evenly.

        Raises:
            UserError: the schedule does not lead here, or prunes at step 0 what is not trained.
        """
        if self.init is None and at and at[0] == 0:
            raise UserError(
                "--at 0 prunes a model before its first step, and this one starts from scratch: "
                "give --init MODEL, or a later step"
            )
        found = at or even_steps(prunings, self.steps, self.init is not None)
        multiples = {kind: self.budget.multiple(kind, size) for kind, size in self.sizes.items()}
        return phases(found, self.steps, self.sizes, self.widths, multiples)

    def budget_of(self, phase: Phase) -> Budget:
        """The budget that prunes the phase before to a phase's widths."""
        whole = self.budget.space == SQUARE and len(phase.widths) == len(self.sizes)
        space = SQUARE if whole and len(set(phase.widths.values())) == 1 else ",".join(phase.widths)
        width: Any = next(iter(phase.widths.values())) if space == SQUARE else dict(phase.widths)
        return replace(
            self.budget,
            ratio=None,
            state_bytes=None,
            width=width,
            space=space,
            for_=(),
            strict_ratio=False,
        )

    def said(self, phase: Phase) -> str:
        """What a phase keeps, in words."""
        kept = (f"{w} of {self.sizes[kind]} {NOUNS[kind]}" for kind, w in phase.widths.items())
        return f"keeps {' and '.join(kept)}"


def _model(init: str | None, config: str) -> tuple[Config, OuterModel | None]:
    if init:
        reference = resolve(init)
        return reference.config, reference.outer
    if not config:
        raise UserError("no model: give --init MODEL, or model.config (a config.json)")
    return named_config(config), None
