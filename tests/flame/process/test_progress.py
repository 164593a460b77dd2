"""What a person sees of what goes on: on a terminal, and in a log."""

import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flame.process import progress as module
from flame.process.progress import phase, progress


def test_off_a_terminal_a_line_says_from_time_to_time_what_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "LINE_SECONDS", 0.05)
    with phase("importing torch"):
        time.sleep(0.12)
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["importing torch, 0:00 so far"] * 2
    for item in progress(["a", "b"], "evaluate"):
        time.sleep(0.08 if item == "b" else 0)
    assert capsys.readouterr().out == "evaluate 1/2, 0:00 so far\n"
    monkeypatch.setenv("RANK", "1")
    for _ in progress(iter("a"), "evaluate"):
        time.sleep(0.12)
    assert capsys.readouterr().out == ""


def test_on_a_terminal_phases_are_named_as_they_begin(tmp_path: Path) -> None:
    """The first before anything heavy is imported."""
    code = (
        "import sys, launch.cli as cli\n"
        "assert 'torch' not in sys.modules\n"
        "cli.main(['convert', './mis/sing', 'out', '--to', 'hf'])"
    )
    ours, theirs = pty.openpty()
    root = Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    subprocess.run([sys.executable, "-c", code], stderr=theirs, cwd=tmp_path, env=environment)
    lines = os.read(ours, 10000).decode().splitlines()
    assert lines[0] == "loading the command …" and lines[1].startswith("checking the options")
    assert (
        lines[2] == "slimstate: error: no model at ./mis/sing: no such folder" and len(lines) == 3
    )
