"""Find out why a job of several processes failed, from what its workers left behind.

When one rank fails, its peers fail after it: they lose a connection, or the agent ends them by a
signal. Only the cause is worth reading. Each worker (worker.py) may leave two files in the report
folder: `rank-N.traceback` for an exception that nothing handled, and `rank-N.stderr`, which rank 0
does not have.
"""

import signal
from collections.abc import Collection, Mapping
from pathlib import Path

ERROR_PREFIX = "slimstate: error: "
LAST_LINES = 20

INTERRUPTED = 130
"""Exit status of a worker that was told to end."""

STOPPED = 143
"""Exit status of a worker that was told to end, and saved its work first."""


def traceback_file(reports: Path, rank: int) -> Path:
    return reports / f"rank-{rank}.traceback"


def stderr_file(reports: Path, rank: int) -> Path:
    return reports / f"rank-{rank}.stderr"


def explain(exit_codes: Mapping[int, int], reports: Path, killed: Collection[int] = ()) -> str:
    """Return what to print on stderr for failed ranks; empty if rank 0 has printed it already.

    It is the first that exists of: a person's mistake, a signal from outside, the earliest
    traceback, an exit status.

    Args:
        exit_codes: by rank, for failed ranks of this node; negative for a signal, as in
            `subprocess`.
        reports: the folder that the workers wrote to.
        killed: ranks that were told to end after another had failed, and did not.
    """
    if killed:
        others = {rank: code for rank, code in exit_codes.items() if rank not in killed}
        ranks = ", ".join(map(str, sorted(killed)))
        hangs = f"{ERROR_PREFIX}rank {ranks} hung or was stopped, and had to be killed\n"
        return (explain(others, reports) if others else "") + hangs
    if _stopped(exit_codes):
        # Rank 0 has said so, on its node.
        elsewhere = f"{ERROR_PREFIX}stopped by a signal on another node, after saving\n"
        return "" if 0 in exit_codes else elsewhere
    if _rank_zero_spoke(exit_codes, reports):
        return ""
    line = next(filter(None, (_error_line(reports, rank) for rank in sorted(exit_codes))), "")
    if line:
        return f"{line}\n"
    for rank, code in sorted(exit_codes.items()):
        if code < 0 and -code != signal.SIGTERM:
            return _last_words(reports, rank) + f"{ERROR_PREFIX}rank {rank} {_signal(-code)}\n"
    return _first_traceback(exit_codes, reports) or _exit_status(exit_codes, reports)


def status(exit_codes: Mapping[int, int]) -> int:
    """Return the job's exit status: 1, or the workers' own if all of them were told to end."""
    if _stopped(exit_codes):
        return STOPPED
    return INTERRUPTED if set(exit_codes.values()) == {INTERRUPTED} else 1


def _stopped(exit_codes: Mapping[int, int]) -> bool:
    """Whether the ranks saved because one of them was told to end.

    The agent tells the others when the first has ended, and may meet them on their own way out.
    """
    codes = set(exit_codes.values())
    return STOPPED in codes and codes <= {STOPPED, INTERRUPTED, -signal.SIGTERM}


def _rank_zero_spoke(exit_codes: Mapping[int, int], reports: Path) -> bool:
    """Whether rank 0 has printed its error, on the terminal: it failed without a traceback."""
    code = exit_codes.get(0, 0)
    return code > 0 and code != INTERRUPTED and not traceback_file(reports, 0).exists()


def _error_line(reports: Path, rank: int) -> str:
    lines = (line for line in _stderr(reports, rank) if line.startswith(ERROR_PREFIX))
    return next(lines, "")


def _first_traceback(exit_codes: Mapping[int, int], reports: Path) -> str:
    files = [(traceback_file(reports, rank), rank) for rank in exit_codes]
    found = [(file.stat().st_mtime_ns, rank, file) for file, rank in files if file.exists()]
    if not found:
        return ""
    _, rank, file = min(found)
    return f"slimstate: rank {rank} failed:\n{file.read_text()}"


def _exit_status(exit_codes: Mapping[int, int], reports: Path) -> str:
    own = [rank for rank, code in exit_codes.items() if code not in (INTERRUPTED, -signal.SIGTERM)]
    rank = min(own or exit_codes)
    reason = f"{ERROR_PREFIX}rank {rank} ended with status {exit_codes[rank]}\n"
    return _last_words(reports, rank) + reason


def _signal(number: int) -> str:
    hint = ": the machine may be out of memory" if number == signal.SIGKILL else ""
    return f"was ended by {signal.Signals(number).name}{hint}"


def _last_words(reports: Path, rank: int) -> str:
    return "".join(f"{line}\n" for line in _stderr(reports, rank)[-LAST_LINES:])


def _stderr(reports: Path, rank: int) -> list[str]:
    file = stderr_file(reports, rank)
    return file.read_text(errors="replace").splitlines() if file.exists() else []
