"""A stage: one command, as an object that every way of starting it uses.

A stage's module ends with

    STAGE = Stage("plan", "Choose the channels to keep.", Options, run, check)

    if __name__ == "__main__":
        STAGE.main()

The launcher (`slimstate plan …`) parses and checks in its own process and then runs workers;
`torchrun … -m pruning.plan …` calls `main` in each worker; another stage calls `call`. A person's
mistake ends each of them with one line on stderr.
"""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from flame import options
from flame.errors import run_stage

T = TypeVar("T")


def nothing_to_answer(options: Any, nproc: int, nnodes: int) -> None:
    """Return None: the `answer` of a stage without options that only print."""


@dataclass(frozen=True)
class Stage(Generic[T]):
    """A command with its options, its checks and its work."""

    name: str
    """The command's name: `slimstate NAME`."""
    description: str
    """One sentence for `--help`."""
    options: type[T]
    """A frozen dataclass whose fields are the options (see `flame.options`)."""
    run: Callable[[T], None]
    """The work, in each process. Collective; inside a process group, or starting one."""
    check: Callable[[T, int], None]
    """Raises UserError for what cannot work on a number of processes. Runs on one process."""
    check_size: Callable[[T, int], None] | None = None
    """Raises UserError for a number of processes that a job which lost nodes cannot go on with;
    None if it cannot go on with fewer at all."""
    answer: Callable[[T, int, int], str | None] = nothing_to_answer
    """Text for options that only print, such as `--estimate`, or None if there is work to do. Takes
    the options, the processes of a node and the number of nodes."""
    stop_seconds: int = 15
    """Seconds that the launcher gives the workers after a signal before it kills them."""
    epilog: str = ""
    """What `--help` says below the options."""

    @property
    def module(self) -> str:
        """The name of the stage's module, to start with `python -m`."""
        return self.run.__module__

    @property
    def program(self) -> str:
        return f"slimstate {self.name}"

    def parse(self, argv: Sequence[str], others: Sequence[str] = ()) -> T:
        """Return the options of a command line; raise UserError for one that cannot be read.

        Args:
            argv: the words.
            others: options that are none of the stage's but may have been meant.
        """
        return options.parse(self.options, self.program, argv, others)

    def help_text(self) -> str:
        """Return the text of `--help`."""
        return options.help_text(self.options, self.program, self.description, self.epilog)

    def call(self, argv: Sequence[Any]) -> None:
        """Parse a command line, check it on rank 0, and run it inside the running process group.

        Stages run other stages by this. Collective: what the check raises is raised on every rank.
        """
        from flame.process.distributed import world_size
        from flame.process.peers import on_first

        parsed = self.parse([str(word) for word in argv])
        on_first(lambda: self.check(parsed, world_size()))
        self.run(parsed)

    def main(self, argv: Sequence[str] | None = None, checked: bool = False) -> None:
        """Run this process's part of a job that torchrun, srun, the launcher or a person started.

        A UserError ends the process with one line on stderr and status 1. Only rank 0 checks.

        Args:
            argv: the command line; None for this process's.
            checked: the launcher has checked the options before it started this process.
        """
        arguments = sys.argv[1:] if argv is None else argv
        run_stage(lambda: self._work(arguments, checked), checked)

    def _work(self, argv: Sequence[str], checked: bool) -> None:
        rank, size = _number("RANK", 0), _number("WORLD_SIZE", 1)
        local = _number("LOCAL_WORLD_SIZE", 1)
        if {"-h", "--help"} & set(argv):
            said: str | None = self.help_text()
        else:
            parsed = self.parse(argv)
            said = self.answer(parsed, local, size // local)
        if said is not None:
            if rank == 0:
                print(said)
            return
        if rank == 0 and not checked:
            self.check(parsed, size)
        self.run(parsed)


def _number(variable: str, default: int) -> int:
    return int(os.environ.get(variable, default))
