"""Signals that come where exceptions are turned into others, or swallowed."""

import signal
import subprocess
import sys
import textwrap

import pytest

PLACES = {
    "a finaliser": """
        class Slow:
            def __del__(self):
                os.kill(os.getpid(), NUMBER)
                for _ in range(1000): pass
        def main():
            Slow()
            time.sleep(60)
        """,
    "an import": """
        def main():
            try:
                os.kill(os.getpid(), NUMBER)
            except BaseException as error:
                raise ImportError("cannot import name") from error
        """,
    "a bare except": """
        def main():
            try:
                os.kill(os.getpid(), NUMBER)
            except:
                pass
            time.sleep(60)
        """,
    "a collective that never returns": """
        def main():
            import ctypes
            threading.Timer(0.5, os.kill, (os.getpid(), NUMBER)).start()
            ctypes.CDLL(None).pause()
            while True: ctypes.CDLL(None).pause()
        """,
    "the end of the work": """
        def main():
            try:
                os.kill(os.getpid(), NUMBER)
            except BaseException:
                pass
        """,
}


@pytest.mark.parametrize(
    ("place", "number"),
    zip(
        PLACES,
        [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGTERM, signal.SIGINT],
        strict=True,
    ),
)
def test_a_signal_ends_the_process_in_silence(place: str, number: signal.Signals) -> None:
    code = (
        "import os, threading, time\nfrom flame import errors\nfrom flame.process import ending\n"
        f"ending.GRACE_SECONDS = 2.0\nNUMBER = {int(number)}\n"
        f"{textwrap.dedent(PLACES[place])}\nerrors.run_stage(main)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, "", "")


def test_a_second_signal_does_not_disturb_the_cleaning_up() -> None:
    code = (
        "import os, time\nfrom flame.errors import run_stage\n"
        "def main():\n"
        "    try: os.kill(os.getpid(), 2); time.sleep(60)\n"
        "    finally:\n"
        "        os.kill(os.getpid(), 2); os.kill(os.getpid(), 15); time.sleep(0.5)\n"
        "        print('clean', flush=True)\n"
        "run_stage(main)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stdout, done.stderr) == (130, "clean\n", "")


def test_an_ignored_interrupt_stays_ignored() -> None:
    """A shell starts background jobs so."""
    code = (
        "import os, signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "from flame.errors import run_stage\n"
        "run_stage(lambda: os.kill(os.getpid(), 2))\nprint('done')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
