"""Ending the process by a signal: quietly, with half-written outputs removed, whatever it is doing.

Inside `ending_by_signals` the first SIGINT, SIGTERM or SIGHUP raises `Ended` in the main thread.
Libraries turn that into other exceptions (DCP does), or swallow it: in a finaliser, in a bare
`except` around an import. So whoever reports errors asks `signal_received` first, and a thread
raises `Ended` again if nothing holds the first one any more. A process that is still there some
seconds later, in a collective that waits for a dead peer, is ended as it is.
"""

import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

GRACE_SECONDS = 5.0
"""Seconds to clean up after a signal."""

_CHECK_SECONDS = 0.3


class Ended(KeyboardInterrupt):
    """A signal asks this process to end."""


class _Ending:
    """What the handlers and the thread of one `ending_by_signals` share."""

    def __init__(self, status: int | None) -> None:
        self.status = status
        self.received = 0
        self.reported = False
        self.again = False
        self.raised: Any = lambda: None

    def handle(self, number: int, frame: FrameType | None) -> None:
        # Others are ignored: they would interrupt the cleaning up.
        if self.received and not self.again:
            return
        self.received, self.again = self.received or number, False
        error = Ended()
        self.raised = weakref.ref(error)
        try:
            raise error
        finally:
            # The traceback holds this frame, which would hold the exception for ever.
            del error

    def watch(self, reading: int) -> None:
        """Wait for a signal; raise it again if it is swallowed; end the process when it is time."""
        number = _first_signal(reading)
        if not number:
            return os.close(reading)
        main, end = threading.main_thread().ident or 0, time.monotonic() + GRACE_SECONDS
        while time.monotonic() < end:
            time.sleep(_CHECK_SECONDS)
            if self.received and not self.reported and self.raised() is None:
                self.again = True
                signal.pthread_kill(main, number)
        self.received = self.received or number
        os._exit(exit_status())


_current = _Ending(None)
"""The one in force; one that has received nothing where there is none."""


def signal_received() -> int:
    """The number of the signal that is ending this process; 0 for none."""
    return _current.received


def exit_status() -> int:
    """The exit status for `signal_received`: as a shell has it, or the one that was asked for."""
    return 128 + _current.received if _current.status is None else _current.status


def reported() -> None:
    """Say that `Ended` has done its work: the process is on its way out."""
    _current.reported = True


@contextmanager
def ending_by_signals(status: int | None = None) -> Iterator[None]:
    """Let signals end the process inside the block; in another than the main thread do nothing.

    A block inside another one changes nothing.

    Args:
        status: the exit status for every signal; None for 128 + its number.
    """
    global _current
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or getattr(signal.getsignal(signal.SIGTERM), "__func__", None) is _Ending.handle:
        yield
        return
    _current = _Ending(status)
    # A shell makes its background jobs ignore Ctrl-C; they go on ignoring it.
    heeded = [kind for kind in SIGNALS if signal.getsignal(kind) is not signal.SIG_IGN]
    before = {kind: signal.signal(kind, _current.handle) for kind in heeded}
    hook = sys.unraisablehook
    sys.unraisablehook = _quietly(hook)
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    descriptor = signal.set_wakeup_fd(writing)
    threading.Thread(target=_current.watch, args=(reading,), daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(descriptor)
        os.close(writing)
        sys.unraisablehook = hook
        for kind, handler in before.items():
            signal.signal(kind, handler)


@contextmanager
def others_signals() -> Iterator[None]:
    """Let the block set handlers of its own, which decide alone; ours are back after it."""
    kinds = (*SIGNALS, signal.SIGQUIT)
    before = {kind: signal.getsignal(kind) for kind in kinds}
    descriptor = signal.set_wakeup_fd(-1)
    try:
        yield
    finally:
        signal.set_wakeup_fd(descriptor)
        for kind, handler in before.items():
            signal.signal(kind, handler)


def _first_signal(reading: int) -> int:
    """The number of the first signal that ends the process; 0 if there came none."""
    while number := os.read(reading, 1):
        if number[0] in SIGNALS:
            return number[0]
    return 0


def _quietly(hook: Any) -> Any:
    """`hook` for exceptions that a finaliser cannot raise, but for ours, which comes again."""

    def quiet(unraisable: Any) -> None:
        if not isinstance(unraisable.exc_value, Ended):
            hook(unraisable)

    return quiet
