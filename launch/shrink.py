"""Stage `shrink`: prune a model in steps while it is trained, in one job.

The phases of a shrinking are a chain of run folders. Each is the one before with fewer channels,
weights and optimizer moments cut alike, and goes on in the schedule and in the data where that one
ended. What is whole in OUT is not made again, so the same command goes on after a stop, on another
number of processes too. SlimQwen (arXiv 2605.08738) has progressive pruning ahead of one shot.
"""

import os
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from flame import train
from flame.checkpoint.reference import CONFIG_FILE
from flame.errors import UserError
from flame.options import argument, group, option, overrides, words
from flame.process.atomic_output import writer_lock
from flame.process.distributed import from_rank_zero, process_group, world_size
from flame.process.peers import on_first
from flame.recipe import option_name
from flame.stage import Stage
from launch.shrinking.folder import ShrinkFolder
from launch.shrinking.schedule import Phase
from launch.shrinking.target import Target
from pruning import prune
from pruning.options import BUDGET, DataOptions, MethodOptions
from pruning.planning.budgets import Budget
from pruning.repair.repaired import REPAIR_HELP, Repair

SET_BY_SHRINK = ("job.config_file", "job.dump_folder", "lr_scheduler.total_steps")


@dataclass(frozen=True)
class Options:
    out: Path = argument("OUT", "folder to write; gone on with if begun")
    config: Path | None = option(None, "the recipe of the training", metavar="RECIPE.toml")
    init: str | None = option(
        None,
        "start from the weights of a run, step or Hugging Face folder (default: the recipe's "
        "model, or none to train from scratch)",
        metavar="MODEL",
    )
    prunings: int = option(
        4, "how often channels go: evenly over the training, from its start with --init", least=1,
        metavar="N",
    )  # fmt: skip
    at: tuple[int, ...] = option(
        (), "steps after which channels go, instead of --prunings; 0 is before the first",
        least=0, metavar="N,N",
    )  # fmt: skip
    repair: Repair | None = option(
        None, f"{REPAIR_HELP} (default: output where neither --method nor --paper is given)"
    )
    overrides: tuple[str, ...] = overrides("override a key of the recipe")
    choice: MethodOptions = group(MethodOptions, "method")
    budget: Budget = group(
        Budget, f"{BUDGET}, of the last phase", without=("allocate", "floor", "pad")
    )
    data: DataOptions = group(DataOptions, "calibration")

    @property
    def folder(self) -> ShrinkFolder:
        return ShrinkFolder(self.out)

    def training(self, init: str | None, *more: str) -> train.Options:
        """The options of `slimstate train` with this recipe."""
        return train.Options(config=self.config, init=init, overrides=(*self.overrides, *more))

    def target(self) -> Target:
        """Where the schedule leads; raises UserError if the recipe, model or budget cannot work."""
        for name in map(option_name, self.overrides):
            if name in SET_BY_SHRINK:
                raise UserError(f"--{name} is for each phase to set: leave it out")
        method = self.choice.chosen(self.data.seed, self.budget.paper)
        return Target.of(self.training(self.init), self.budget, method)

    def phases(self, target: Target) -> list[Phase]:
        """The phases in order; raises UserError if the schedule does not lead to the target."""
        return target.phases(self.at, self.prunings)


def check(options: Options, world_size: int = 1) -> None:
    """Raise UserError if the schedule, recipe, model, method, data or output cannot work."""
    target = options.target()
    phases = options.phases(target)
    folder = options.folder
    folder.check(_settings(options, phases))
    phase = next((p for p in phases if not _is_trained(folder, p)), None)
    if phase is None:
        return
    if phase.number == 1 and phase.widths and not folder.start.exists():
        prune.check(_pruning(options, target, phase), world_size)
    # What a later phase starts from may not be there yet; the first is checked like it.
    if phase.number == 1 or folder.steps_done(phase) is not None:
        train.check(_training(options, target, phase), world_size)


def run(options: Options) -> None:
    """Make the phases that are not whole yet. Collective; starts a process group.

    Raises:
        UserError: a phase cannot be made, or its data ended before its last step.
        SystemExit: a signal ended the training, whose last step is saved.
    """
    import flame.register  # noqa: F401

    first = int(os.environ.get("RANK", "0")) == 0
    target = options.target()
    phases, folder = options.phases(target), options.folder
    with writer_lock(options.out) if first else nullcontext(), process_group():
        on_first(lambda: folder.begin(_settings(options, phases)))
        for phase in phases:
            if not from_rank_zero(_is_trained(folder, phase)):
                _make(options, target, phase, f"phase {phase.number} of {len(phases)}")
    if first:
        print(f"{folder.run(phases[-1])} {target.said(phases[-1])}", flush=True)


def _make(options: Options, target: Target, phase: Phase, name: str) -> None:
    """Prune and train one phase, or go on with it. Collective."""
    folder, pruning = options.folder, _pruning(options, target, phase)
    if phase.widths and not from_rank_zero(pruning.out.exists()):
        said = f"{name}: after step {phase.start} it {target.said(phase)}"
        on_first(lambda: print(said, flush=True))
        on_first(lambda: prune.check(pruning, world_size()))
        prune.run(pruning)
    train.run(_training(options, target, phase))
    if not from_rank_zero(_is_trained(folder, phase)):
        raise UserError(
            f"{folder.run(phase)} ended before step {phase.end}, since its data did: give more "
            "data, or fewer training.steps"
        )


def _pruning(options: Options, target: Target, phase: Phase) -> prune.Options:
    """The options of `slimstate prune` that make what a phase trains."""
    folder, first = options.folder, phase.number == 1
    return prune.Options(
        model=str(target.init) if first else str(folder.before(phase)),
        out=folder.start if first else folder.run(phase),
        repair=options.repair,
        choice=options.choice,
        budget=target.budget_of(phase),
        data=_of_recipe(options, target) if first else options.data,
    )


def _of_recipe(options: Options, target: Target) -> DataOptions:
    """The data for what goes before the first step: as later phases have it, the training's."""
    data = replace(options.data, recipe=options.data.recipe or options.config)
    if not data.tokenizer:
        data = replace(data, tokenizer=target.data.tokenizer)
    if data.data or "data.dataset" not in map(option_name, options.overrides):
        return data
    of_training = ("subset", "split", "text_key")
    given = {name: getattr(data, name) or getattr(target.data, name) for name in of_training}
    return replace(data, data=target.data.dataset, **given)


def _training(options: Options, target: Target, phase: Phase) -> train.Options:
    """The options of `slimstate train` for a phase."""
    run = options.folder.run(phase)
    more = ["--training.steps", str(phase.end), "--lr_scheduler.total_steps", str(target.steps)]
    more += ["--job.dump_folder", str(run)]
    if phase.number > 1:
        # A pruned run goes on with what lies in it, whatever the recipe started from.
        more += ["--model.init", "", "--model.config", str(run / CONFIG_FILE)]
    init = target.init if phase.number == 1 else None
    if phase.number == 1 and options.folder.start.exists():
        init = str(options.folder.start)
    return options.training(init, *more)


def _is_trained(folder: ShrinkFolder, phase: Phase) -> bool:
    step = folder.steps_done(phase)
    return step is not None and step >= phase.end


def _settings(options: Options, phases: list[Phase]) -> dict[str, Any]:
    """What all phases depend on."""
    return {
        "phases": [asdict(phase) for phase in phases],
        "method": words(options.choice),
        "repair": options.repair,
        **({"gain": options.budget.gain} if options.budget.gain else {}),
        "calibration": words(options.data),
    }


STAGE = Stage(
    "shrink",
    "Prune a model in steps while it is trained, in one job.",
    Options,
    run,
    check,
    # For the step in hand and its checkpoint.
    stop_seconds=600,
    epilog="The phases are run folders OUT/phase-1, OUT/phase-2 and so on; the last is the result. "
    "The same command goes on after a stop, on another number of processes too.",
)

if __name__ == "__main__":
    STAGE.main()
