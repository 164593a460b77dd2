"""Stopping a training loop by a signal between two steps, not in the middle of one.

A scheduler sends SIGTERM and kills some time later; Ctrl-C sends SIGINT. Inside `StopSignals` the
first of either is a request that the loop answers after its step. A second Ctrl-C takes effect at
once, as every signal does outside the loop. A second SIGTERM changes nothing: srun sends it to
every process and torchrun passes its own on, so one request may arrive twice.
"""

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

REQUESTS = (signal.SIGTERM, signal.SIGINT)
ONE_KEYSTROKE = 1.0
"""Seconds within which one Ctrl-C may arrive twice, from the terminal and from torchrun."""


class StopSignals:
    """In `with StopSignals() as signals`, `signals.received` is the first request's number, or 0.

    Only a process's main thread can handle signals; in another thread `received` stays 0.
    """

    def __init__(self) -> None:
        self.received = 0
        self._patience = _Patience()
        self._handlers: dict[int, Any] = {}
        self._wakeup: _Wakeup | None = None

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for kind in REQUESTS:
                # A shell makes its background jobs ignore Ctrl-C; they go on ignoring it.
                if signal.getsignal(kind) is not signal.SIG_IGN:
                    self._handlers[kind] = signal.signal(kind, self._receive)
            self._wakeup = _Wakeup()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if self._wakeup is not None:
            self._wakeup.close()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self._patience.ends_with(number):
            self.received = self.received or number
            return
        handler = self._handlers[number]
        if not callable(handler):
            raise KeyboardInterrupt
        handler(number, frame)


class _Patience:
    """Tells requests to stop after the step from signals that must take effect at once."""

    def __init__(self) -> None:
        self._interrupted: float | None = None

    def ends_with(self, number: int) -> bool:
        """Whether signal `number`, which arrived now, must take effect at once.

        Call it once for each signal: it notes when the first SIGINT came. SIGTERM and SIGINT
        take effect at once only if that was more than `ONE_KEYSTROKE` ago; every other signal does.
        """
        if number not in REQUESTS:
            return True
        now = time.monotonic()
        if self._interrupted is not None and now - self._interrupted > ONE_KEYSTROKE:
            return True
        if number == signal.SIGINT and self._interrupted is None:
            self._interrupted = now
        return False


class _Wakeup:
    """Passes signals on to the wake-up descriptor that was set before, except requests.

    A launcher's thread reads that descriptor and ends the process some seconds after a signal,
    even if the main thread waits for a dead peer (launch/processes/worker.py).
    """

    def __init__(self) -> None:
        self._outer = signal.set_wakeup_fd(-1)
        if self._outer < 0:
            return
        reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        signal.set_wakeup_fd(self._writing)
        threading.Thread(target=self._forward, args=(reading,), daemon=True).start()

    def close(self) -> None:
        signal.set_wakeup_fd(self._outer)
        if self._outer >= 0:
            os.close(self._writing)

    def _forward(self, reading: int) -> None:
        patience = _Patience()
        while number := os.read(reading, 1):
            if patience.ends_with(number[0]):
                os.write(self._outer, number)
        os.close(reading)
