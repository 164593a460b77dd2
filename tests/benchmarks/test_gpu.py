"""`benchmarks/gpu.sh`: every command's rehearsal, going on where it stood, the page, mistakes."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from benchmarks.gpu.__main__ import run
from benchmarks.gpu.page import page
from benchmarks.gpu.parts import Command, parts
from benchmarks.train_speed import idleness

ROOT = Path(__file__).parents[2]


def gpu_sh(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "benchmarks/gpu.sh", *map(str, words)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )


def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    first = gpu_sh(tmp_path, "--rehearse", "--parts", "machine")
    assert first.returncode == 0, first.stdout + first.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    (line,) = results["commands"]
    assert line == "python -m benchmarks.gpu.machine"
    assert "no figure of this page is of a GPU" in (tmp_path / "page.md").read_text()
    assert "== machine" not in gpu_sh(tmp_path, "--rehearse", "--parts", "machine").stdout
    other = gpu_sh(tmp_path, "--parts", "machine")
    assert (other.returncode, other.stderr) == (1, f"{tmp_path} holds a rehearsal: --again\n")


@pytest.mark.slow
def test_every_command_passes_its_rehearsal(tmp_path: Path) -> None:
    done = gpu_sh(tmp_path, "--rehearse")
    assert done.returncode == 0, done.stdout + done.stderr
    commands = json.loads((tmp_path / "results.json").read_text())["commands"]
    wanted = [c.line for part in parts(tmp_path / "work", True) for c in part.commands]
    assert list(commands) == wanted
    # 5: pytest found no GPU, and skipped all that is marked so
    failed = {line: r["output"] for line, r in commands.items() if r["status"] not in (0, 5)}
    assert not failed
    assert "not run" not in (tmp_path / "page.md").read_text()


def test_a_command_that_hangs_is_ended_with_its_children() -> None:
    found = run(Command(("timeit", "-n1", "-r1", "import time; time.sleep(60)")), limit=1.0)
    assert found["status"] == "stopped after 1 s" and found["seconds"] < 30


def test_the_page_says_what_failed_and_what_was_not_run(tmp_path: Path) -> None:
    made = parts(tmp_path, rehearse=True)
    line = made[0].commands[0].line
    failed = {"status": 1, "seconds": 2.0, "output": "no such device\n"}
    text = page(made, {"rehearsal": False, "commands": {line: failed}})
    assert "1 of" in text and "1 of them failed" in text and "**Failed: 1.**" in text
    assert "no such device" in text and "not run" in text


def test_idleness_of_overlapping_kernels() -> None:
    spans = [(0, 10), (5, 10), (12, 8), (40, 10)]
    events = [{"cat": "kernel", "ts": begin, "dur": length} for begin, length in spans]
    events.append({"cat": "cpu_op", "ts": 0, "dur": 100})
    # busy 0 to 15, 12 to 20, 40 to 50: one pause of 20 microseconds in 50
    assert idleness(events) == {"idle": pytest.approx(20 / 50), "gap": pytest.approx(0.02)}
    assert idleness([]) == {}
