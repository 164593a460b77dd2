"""Which lines of the log a person sees."""

import subprocess
import sys

import pytest

LINES = {
    "step: 10  loss:  5.1": True,
    "validate step: 10  loss:  5.1": True,
    "\033[31mstep: 10  \033[32mloss:  5.1\033[39m": True,
    "\033[33mvalidate step: 10  \033[32mloss:  5.1\033[39m": True,
    "\033[34mModel causal_lm": True,
    "Training starts at step 1": False,
    "\033[31mBuilding 1-D device mesh": False,
}


@pytest.mark.parametrize("line", LINES)
def test_torchtitans_progress_is_shown_with_and_without_colours(line: str) -> None:
    code = "import logging, sys; from flame.process import logs; logs.configure()"
    command = [sys.executable, "-c", f"{code}; logging.getLogger().info(sys.argv[1])", line]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100).stdout
    assert (line in shown) is LINES[line]
