"""Three mistakes with every stage, under `slimstate` and under torchrun: one line, status not zero.

torchrun prints a report of its own about the process that failed; the line is ours.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch import cli
from launch.processes import launcher

ROOT = Path(__file__).parents[2]
RECIPE = str(ROOT / "launch/recipes/demo_pretrain.toml")

HALF = ("--method", "l1", "--ratio", "0.5")

MISSING: dict[str, tuple[str, ...]] = {
    "tokenizer": ("out", "--data", "./nowhere"),
    "train": ("--config", "nowhere.toml"),
    "recipes": ("--copy", "nowhere"),
    "calibrate": ("./nowhere", "out"),
    "plan": ("./nowhere", "out", *HALF),
    "apply": ("./nowhere", "plan.json", "out"),
    "prune": ("./nowhere", "out", *HALF),
    "shrink": (
        "out",
        "--config",
        RECIPE,
        "--init",
        "./nowhere",
        "--method",
        "l1",
        "--ratio",
        "0.5",
    ),
    "convert": ("./nowhere", "out", "--to", "hf"),
    "eval": ("./nowhere", "--perplexity"),
    "bench": ("./nowhere",),
    "capacity": ("./nowhere",),
    "serve-check": ("./nowhere",),
    "analyze": ("./nowhere", "out"),
    "recall": ("./nowhere",),
    "report": ("./nowhere",),
    "sweep": ("./nowhere", "out", "--methods", "l1", "--ratios", "0.5"),
    "demo": ("--out", "file/nowhere"),
}
"""A command line that names what is not there. The demo reads nothing: it writes into a file."""

WRONG_TYPE: dict[str, tuple[str, ...]] = {
    "tokenizer": ("--size", "many"),
    "train": ("--config", RECIPE, "--training.steps", "many"),
    "recipes": ("--overwrite=many",),
    "calibrate": ("--sequences", "many"),
    "plan": ("--seed", "many"),
    "apply": ("--to", "many"),
    "prune": ("--state-bytes", "many"),
    "shrink": ("--at", "0,many"),
    "convert": ("--to", "many"),
    "eval": ("--batch", "many"),
    "bench": ("--lengths", "16,many"),
    "capacity": ("--slots", "many"),
    "serve-check": ("--tensor-parallel", "many"),
    "analyze": ("--epsilon", "many"),
    "recall": ("--pairs", "4,many"),
    "report": ("--latex=many",),
    "sweep": ("--seeds", "many"),
    "demo": ("--ratio", "many"),
}
"""An option whose value is none, to follow the command line of MISSING."""

KINDS = ("unknown option", "wrong type", "missing file")
CASES = [(name, kind) for name in cli.COMMANDS for kind in KINDS]

FAST = {("plan", "unknown option"), ("eval", "wrong type"), ("prune", "missing file")}
"""Starts of torchrun that the fast part of the suite makes."""

ALONE = ("tokenizer", "recipes", "bench", "capacity", "serve-check", "report")
"""Stages of one process."""


def arguments(name: str, kind: str) -> list[str]:
    if kind == "unknown option":
        return [*MISSING[name], "--colour", "red"]
    if kind == "missing file":
        return list(MISSING[name])
    return [*(() if name == "train" else MISSING[name]), *WRONG_TYPE[name]]


def expected(name: str, kind: str) -> str:
    """A regular expression for what the line must name."""
    if kind == "unknown option":
        return "unrecognized arguments: --colour"
    return "nowhere" if kind == "missing file" else r"steps.*many|many|--latex"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    yield
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_all_stages_are_here() -> None:
    assert list(MISSING) == list(WRONG_TYPE)
    assert set(MISSING) == set(cli.COMMANDS)


@pytest.mark.parametrize("nproc", [1, 2])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_under_slimstate(
    name: str,
    kind: str,
    nproc: int,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(launcher.Job, "run", lambda job: pytest.fail("work was started"))
    with pytest.raises(SystemExit) as end:
        cli.main([name, *arguments(name, kind), "--nproc", str(nproc)])
    out, err = capfd.readouterr()
    assert (end.value.code, out) == (1, "")
    alone = name in ALONE and nproc == 2 and kind == "missing file"
    assert re.fullmatch(r"slimstate: error: [^\n]+\n", err)
    assert re.search("run it on 1 process" if alone else expected(name, kind), err)


def torchrun(module: str, *words: str, nproc: int = 2) -> subprocess.CompletedProcess[str]:
    """A stage as `torchrun -m` starts it from another folder."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*start, "--nproc-per-node", str(nproc), "-m", module, *words],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    """Our one line of a job that failed without a traceback through our files."""
    assert done.returncode != 0
    assert not re.search(rf'File "{ROOT}/(flame|kernels|launch|pruning)/', done.stderr)
    (line,) = ours(done)
    return line


def ours(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith("slimstate:")]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(
            *case, marks=() if case in FAST else pytest.mark.slow, id=f"{case[0]}: {case[1]}"
        )
        for case in CASES
    ],
)
def test_under_torchrun(name: str, kind: str) -> None:
    nproc = 1 if name in ALONE else 2
    done = torchrun(cli.COMMANDS[name].module, *arguments(name, kind), nproc=nproc)
    assert re.search(expected(name, kind), one_line(done))


def test_an_error_of_another_rank_alone_is_reported() -> None:
    done = torchrun("tests.launch.probe_stage", "damage")
    assert done.returncode != 0
    assert ours(done) == ["slimstate: error: shard 1 is damaged"]


def test_help_is_printed_once_under_torchrun() -> None:
    done = torchrun("tests.launch.probe_stage", "--help")
    assert done.returncode == 0
    assert done.stdout.count("usage: slimstate probe") == 1
