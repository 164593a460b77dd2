"""Errors that a person can mend, and the one way in which a stage reports them."""

import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")

RANK_ZERO_HEAD_START = 3.0
"""Seconds that ranks above 0 wait before they report: an error of all ranks is read once."""


class UserError(Exception):
    """A mistake that a person can mend: one line with the value, the bound and what to do."""


def run_stage(main: Callable[[], None]) -> None:
    """Run `main`; turn a `UserError` into one line on stderr and exit status 1, Ctrl-C into 130.

    Every rank of a job may raise the same error. Rank 0 reports at once; the launcher then ends
    the others, so another rank speaks only when the error is its own.
    """
    try:
        main()
    except UserError as error:
        if int(os.environ.get("RANK", "0")) > 0:
            time.sleep(RANK_ZERO_HEAD_START)
        report(error)
        leave(1)
    except KeyboardInterrupt:
        leave(130)


def run_command(
    parse: Callable[[list[str] | None], T],
    check: Callable[[T, int], None],
    run: Callable[[T], None],
    argv: list[str] | None,
) -> None:
    """Run a stage from its command line, in this process or as one of torchrun's.

    Args:
        parse, check, run: the stage's own; `check` gets the number of processes.
        argv: the command line; None for this process's.
    """

    def stage() -> None:
        options = parse(argv)
        check(options, int(os.environ.get("WORLD_SIZE", "1")))
        run(options)

    run_stage(stage)


def report(error: UserError) -> None:
    """Print `error` as one line on stderr."""
    line = " ".join(str(error).split())
    print(f"slimstate: error: {line}", file=sys.stderr, flush=True)


def leave(status: int) -> None:
    """Exit with `status`; in a multi-process job without waiting for peers in a collective."""
    sys.stdout.flush()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        os._exit(status)
    sys.exit(status)


def first_line(error: BaseException) -> str:
    """The first line of another library's message, to quote in a `UserError`."""
    lines: Sequence[str] = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def some(names: Sequence[str], limit: int) -> str:
    """The first `limit` names of a list, and how many more there are, for a `UserError`."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
