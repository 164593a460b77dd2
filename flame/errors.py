"""The error for mistakes that a person can mend, and how a stage reports it on one line."""

import io
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Sequence

from flame.process.ending import ending_by_signals, exit_status, reported, signal_received

OWN_ERROR_SECONDS = 3.0
"""Seconds after which a rank above 0 reports an error that it may have met alone."""

COMMON_ERROR_SECONDS = 60.0
"""Seconds after which it reports one that rank 0 will meet too, and that ends the job before."""


LONGEST_LINE = 1500
"""Characters of a printed error."""


class UserError(Exception):
    """A mistake that a person can mend: one line with the value, the bound and what to do."""

    has_waited = False
    """Whether rank 0 has had its time to report the same error; another rank may report it now."""


def run_stage(main: Callable[[], None], checked: bool = False) -> None:
    """Run `main`; turn a `UserError` into one line on stderr and exit status 1.

    A signal ends it silently with 128 + its number, whatever exception libraries have made of it.
    Rank 0 reports at once, and the launcher then ends the others. Another rank therefore waits
    first, and speaks only if it is still there: of an error that it alone has met.

    Args:
        main: what to run.
        checked: rank 0 makes no checks in `main`, so that no other rank need wait for them.
    """
    for stream in (sys.stdout, sys.stderr):
        # A terminal that is not in UTF-8 shows question marks.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    with ending_by_signals():
        _run_stage(main, checked)


def _run_stage(main: Callable[[], None], checked: bool) -> None:
    try:
        main()
        sys.stdout.flush()
    except SystemExit:
        raise
    except BaseException as error:
        _leave_if_ended(error)
        if isinstance(error, BrokenPipeError):
            _leave_if_unread()
        if not isinstance(error, UserError):
            raise
        try:
            wait_for_rank_zero(error, OWN_ERROR_SECONDS if checked else COMMON_ERROR_SECONDS)
        except KeyboardInterrupt as end:
            _leave_if_ended(end)
        report(error)
        leave(1)
    if signal_received():
        leave(exit_status())


def _leave_if_unread() -> None:
    """Exit in silence, as a shell's own programs do, if what reads the output has gone."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    if any(event & select.POLLERR for _, event in output.poll(0)):
        # The interpreter flushes once more at its end, and would complain then.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        leave(128 + signal.SIGPIPE)


def _leave_if_ended(error: BaseException) -> None:
    """Exit in silence if a signal is behind `error`."""
    if signal_received():
        reported()
        leave(exit_status())
    if isinstance(error, KeyboardInterrupt):
        leave(130)


def wait_for_rank_zero(error: UserError, seconds: float) -> None:
    """On a rank above 0, sleep so that rank 0 can report `error` first; once for each error."""
    if int(os.environ.get("RANK", "0")) > 0 and not error.has_waited:
        time.sleep(seconds)
    error.has_waited = True


def report(error: UserError) -> None:
    """Print `error` as one line on stderr, without control characters and of bounded length."""
    line = " ".join(str(error).split())
    line = "".join(character if character.isprintable() else "?" for character in line)
    if len(line) > LONGEST_LINE:
        # What is wrong stands at the end, after the names of a stranger's files and tensors.
        half = LONGEST_LINE // 2
        line = f"{line[:half]} ... {line[-half:]}"
    print(f"slimstate: error: {line}", file=sys.stderr, flush=True)


def leave(status: int) -> None:
    """Exit with `status`. In a job of several processes do not wait for peers in a collective."""
    sys.stdout.flush()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        os._exit(status)
    sys.exit(status)


def first_line(error: BaseException) -> str:
    """Return the first line of another library's message, to quote it in a `UserError`."""
    lines: Sequence[str] = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def some(names: Sequence[str], limit: int) -> str:
    """Return the first `limit` names of a list, and how many more there are, for a `UserError`."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
