"""One process of a job that the launcher started: runs a stage whose options have been checked.

    python -m launch.processes.worker REPORTS MODULE ARGUMENTS …

Only rank 0 writes to the terminal. What other ranks write on stderr, and every rank's traceback of
an exception that nothing handles, go to the folder REPORTS, where the launcher looks for the cause
of a failure (launch/processes/failures.py).
"""

import ctypes
import os
import signal
import sys
import threading
import time
import traceback
from importlib import import_module
from pathlib import Path
from types import FrameType, TracebackType

from launch.processes.failures import INTERRUPTED, stderr_file, traceback_file

GRACE_SECONDS = 5.0
"""Seconds to clean up after a signal; a collective that waits for a dead peer never returns."""

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_PR_SET_PDEATHSIG = 1


def main() -> None:
    folder, module, *arguments = sys.argv[1:]
    reports, rank = Path(folder), int(os.environ["RANK"])
    _report_tracebacks(traceback_file(reports, rank))
    if rank > 0:
        _redirect_output(stderr_file(reports, rank))
    _end_on_signals()
    sys.argv = [module, *arguments]
    import_module(module).STAGE.main(arguments, checked=True)


def _report_tracebacks(file: Path) -> None:
    # An earlier attempt under --max-restarts may have left one.
    file.unlink(missing_ok=True)

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        # The launcher's signal, when a peer failed first, would end up as an error in this hook.
        _be_deaf()
        if kind is KeyboardInterrupt:
            os._exit(INTERRUPTED)
        file.write_text("".join(traceback.format_exception(kind, error, trace)))
        os._exit(1)

    sys.excepthook = hook


def _redirect_output(stderr: Path) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    os.dup2(os.open(stderr, flags, 0o600), sys.stderr.fileno())


def _end_on_signals() -> None:
    """Let a signal raise KeyboardInterrupt, and end the process if it still runs 5 s later.

    The exception gives the process time to remove a half-written output. When the launcher dies,
    the kernel sends SIGHUP. While a training loop runs it handles SIGTERM and SIGINT itself, to
    save first (`stop_signals.py`), but not SIGHUP: a new job may wait for the run folder.
    """
    for kind in ENDING:
        signal.signal(kind, _interrupt)
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing)
    threading.Thread(target=_leave_later, args=(reading,), daemon=True).start()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGHUP)


def _interrupt(number: int, frame: FrameType | None) -> None:
    _be_deaf()
    raise KeyboardInterrupt


def _be_deaf() -> None:
    for kind in ENDING:
        signal.signal(kind, signal.SIG_IGN)


def _leave_later(wakeup: int) -> None:
    os.read(wakeup, 1)
    time.sleep(GRACE_SECONDS)
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    main()
