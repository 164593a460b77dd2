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
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

from flame.process.ending import SIGNALS, ending_by_signals, signal_received
from flame.process.progress import phase
from launch.processes.failures import INTERRUPTED, stderr_file, traceback_file

_PR_SET_PDEATHSIG = 1


def main() -> None:
    folder, module, *arguments = sys.argv[1:]
    reports, rank = Path(folder), int(os.environ["RANK"])
    if rank > 0:
        _redirect_output(stderr_file(reports, rank))
    _end_with_launcher()
    sys.argv = [module, *arguments]
    # The launcher's own status says which signal it was; 143 of a worker means that it has saved.
    with ending_by_signals(INTERRUPTED), _reporting_tracebacks(traceback_file(reports, rank)):
        with phase("importing torch and the models"):
            stage = import_module(module).STAGE
        stage.main(arguments, checked=True)


@contextmanager
def _reporting_tracebacks(file: Path) -> Iterator[None]:
    """Write the traceback of an exception in the block to a file, and end the process."""
    # An earlier attempt under --max-restarts may have left one.
    file.unlink(missing_ok=True)
    try:
        yield
    except SystemExit:
        raise
    except BaseException:  # noqa: BLE001
        # The launcher's signal, when a peer failed first, would end up as an error in here.
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        if not signal_received():
            file.write_text(traceback.format_exc())
        os._exit(INTERRUPTED if signal_received() else 1)


def _redirect_output(stderr: Path) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    os.dup2(os.open(stderr, flags, 0o600), sys.stderr.fileno())


def _end_with_launcher() -> None:
    """Ask the kernel for SIGHUP when the launcher dies.

    A training loop heeds SIGTERM and SIGINT itself, to save first (`stop_signals.py`), but not
    SIGHUP: a new job may wait for the run folder.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGHUP)


if __name__ == "__main__":
    main()
