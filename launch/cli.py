"""The `slimstate` command: the first word names a stage, and the rest are its arguments.

A stage's module is imported when its command is asked for, so that `slimstate --help` imports
nothing heavy.
"""

import difflib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

from flame.errors import UserError, run_stage
from flame.process.environment import DRY_RUN_VARIABLE, environment
from flame.process.progress import phase
from flame.stage import Stage
from launch.processes import launcher, topology


@dataclass(frozen=True)
class Command:
    """How a command is listed and started."""

    module: str
    """The module whose `STAGE` the command runs."""
    summary: str
    """One line of `slimstate --help`."""

    nproc: int = 1
    """Processes to start without `--nproc`, if the machine has as many GPUs, or none."""


COMMANDS = {
    "tokenizer": Command("flame.tokenizer", "train a byte-level BPE tokenizer on text"),
    "train": Command("flame.train", "pretrain, continue or recover a model, as a recipe says"),
    "recipes": Command("launch.shipped", "list, show and copy the recipes that come with it"),
    "calibrate": Command("pruning.calibrate", "sum a model's statistics over training data"),
    "plan": Command("pruning.plan", "choose the channels to keep"),
    "apply": Command("pruning.apply", "apply a plan to a checkpoint"),
    "prune": Command("pruning.prune", "calibrate, plan and apply in one"),
    "shrink": Command("launch.shrink", "prune a model in steps while it is trained"),
    "convert": Command("flame.convert", "convert between DCP and Hugging Face checkpoints"),
    "eval": Command("launch.evaluate", "measure perplexity, tasks and fidelity of models"),
    "bench": Command("launch.bench", "measure size and speed, beside another model"),
    "capacity": Command("launch.capacity", "work out how many requests a GPU holds"),
    "serve-check": Command("launch.serve_check", "say which engines serve a model, and on what"),
    "analyze": Command("launch.analyze", "measure the rank of the recurrent states over time"),
    "recall": Command("launch.recall", "measure associative recall and needles in haystacks"),
    "report": Command("launch.report", "write one page about runs and their results"),
    "sweep": Command("launch.sweep", "prune by many methods and ratios, and measure all"),
    "demo": Command("launch.demo", "pretrain, prune, recover and evaluate a small model", 2),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line `argv` (default: this process's) and exit on any error."""
    words = list(sys.argv[1:] if argv is None else argv)
    run_stage(lambda: dispatch(words))


def dispatch(words: list[str]) -> None:
    """Check and run one command line, e.g. `["eval", "runs/demo/dense", "--nproc", "2"]`.

    Raises:
        UserError: what a person can mend, found before any worker started.
        SystemExit: a worker failed, and the reason has been printed.
    """
    if not words:
        raise UserError(f"no command: choose from {', '.join(COMMANDS)} (slimstate --help)")
    name, *arguments = words
    if name in ("-h", "--help", "help"):
        print(overview())
    elif name == "--version":
        print(f"slimstate {_version()}")
    else:
        _run(_command(name), arguments)


def overview() -> str:
    """Return the text of `slimstate --help`."""
    lines = ["usage: slimstate COMMAND [ARGUMENTS …] [--nproc N …] [--dry-run]", "", "commands:"]
    lines += [f"  {name:<11} {command.summary}" for name, command in COMMANDS.items()]
    lines += ["", "`slimstate COMMAND --help` lists a command's arguments."]
    return "\n".join(lines)


def _command(name: str) -> Command:
    if name in COMMANDS:
        return COMMANDS[name]
    near = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(COMMANDS)}"
    raise UserError(f"unknown command {name}: {hint}")


def _run(command: Command, arguments: list[str]) -> None:
    with phase("loading the command"):
        stage: Stage = import_module(command.module).STAGE
    if {"-h", "--help"} & set(arguments):
        print(f"{stage.help_text()}\n{topology.options_help()}")
        return
    processes, dry_run, rest = topology.split_options(arguments, command.nproc)
    options = stage.parse(rest, topology.FLAGS)
    said = stage.answer(options, processes.nproc, processes.nnodes)
    if said is not None:
        print(said)
        return
    job = launcher.Job(stage, rest, options, processes)
    dry = {DRY_RUN_VARIABLE: "1"} if dry_run else {}
    with phase("checking the options, the model and the data"), environment(dry):
        job.check()
    if dry_run:
        print(job.command_line())
    else:
        job.run()


def _version() -> str:
    from importlib.metadata import version

    return version("slimstate")


if __name__ == "__main__":
    main()
