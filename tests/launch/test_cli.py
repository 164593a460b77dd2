"""The command line: what it says, how fast, and that each mistake is one line."""

import json
import os
import resource
import subprocess
import sys
import types
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from flame.options import REQUIRED, option
from flame.stage import Stage
from launch import cli
from launch.processes.launcher import Job

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class ToyOptions:
    size: int = option(REQUIRED, "a size", metavar="SIZE")
    note: str = option("", "a note")


COMMAND = [sys.executable, "-m", "launch.cli"]


def test_overview_imports_nothing_heavy() -> None:
    code = (
        "import json, sys; from launch import cli; cli.dispatch(['--help']); "
        "print(json.dumps(sorted(sys.modules)))"
    )
    before = _children_cpu_seconds()
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert _children_cpu_seconds() - before < 0.3
    *overview, modules = out.splitlines()
    assert not {"torch", "numpy", "transformers", "torchtitan", "fla"} & set(json.loads(modules))
    for name, command in cli.COMMANDS.items():
        assert any(line.split() == [name, *command.summary.split()] for line in overview)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no command: choose from tokenizer, train"),
        (["prnue"], "unknown command prnue: did you mean prune?"),
        (["xyz"], "unknown command xyz: choose from tokenizer, train"),
        (["--nproc", "2"], "unknown command --nproc: choose from"),
        (
            ["toy", "--size", "3", "--color", "red"],
            "unrecognized arguments: --color (slimstate toy --help)",
        ),
        (["toy", "--nprocs", "2"], "unrecognized arguments: --nprocs: did you mean --nproc?"),
        (["toy", "--size", "big"], "--size: big is not a whole number"),
        (["toy"], "the following arguments are required: --size (slimstate toy --help)"),
        (["toy", "--size", "3", "--nproc", "0"], "--nproc: 0 is not a whole number of at least 1"),
        (["toy", "--size", "3", "--nnodes", "2"], "--nnodes 2 needs --rdzv-endpoint HOST:PORT"),
    ],
)
def test_mistakes_are_one_line(
    toy: Any, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert exit_.value.code == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"slimstate: error: {message}")
    assert err.count("\n") == 1
    assert toy.ran == []


def test_stage_runs_with_its_own_options(toy: Any) -> None:
    cli.main(["toy", "--size", "3", "--nproc", "1"])
    assert toy.ran == [3]


def test_dry_run_checks_and_prints(toy: Any, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["toy", "--size", "3", "--note", "a b", "--nproc", "4", "--dry-run"])
    assert toy.ran == []
    assert toy.checked == [4]
    out = capsys.readouterr().out
    options = "--standalone --local-addr 127.0.0.1 --nproc-per-node 4"
    assert out == f"torchrun {options} -m toy_stage --size 3 --note 'a b'\n"


def test_demo_takes_two_processes_by_default(
    toy: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.COMMANDS["demo"].nproc == 2
    monkeypatch.setitem(cli.COMMANDS, "toy", cli.Command("toy_stage", "a toy", nproc=2))
    cli.main(["toy", "--size", "3", "--dry-run"])
    cli.main(["toy", "--size", "3", "--nproc", "1", "--dry-run"])
    assert toy.checked == [2, 1]


def test_help_is_the_stages_and_the_launchers(toy: Any, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["toy", "--help"])
    out = capsys.readouterr().out
    assert out.startswith("usage: slimstate toy [-h] --size SIZE")
    assert "--nproc N" in out
    assert "--dry-run" in out


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_a_stage(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    stage = import_module(cli.COMMANDS[name].module).STAGE
    assert (stage.name, stage.module) == (name, cli.COMMANDS[name].module)
    cli.main([name, "--help"])
    assert capsys.readouterr().out.startswith(f"usage: slimstate {name}")


def test_command_lines_are_parsed_without_heavy_imports() -> None:
    modules = ", ".join(command.module for command in cli.COMMANDS.values())
    code = f"import sys, {modules}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not {"torchtitan", "fla", "transformers", "peft"} & set(done.stdout.split())


def test_installed_module_runs_as_a_program() -> None:
    done = subprocess.run([*COMMAND, "prnue"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == "slimstate: error: unknown command prnue: did you mean prune?\n"


def test_keyboard_interrupt_is_silent(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(job: Job) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Job, "run", interrupt)
    with pytest.raises(SystemExit) as exit_:
        cli.main(["toy", "--size", "3"])
    assert exit_.value.code == 130


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A stage that keeps what it was checked for and ran, registered as `slimstate toy`."""
    module: Any = types.ModuleType("toy_stage")
    module.ran, module.checked = [], []

    def check(options: ToyOptions, world_size: int) -> None:
        assert os.environ["WORLD_SIZE"] == str(world_size)
        module.checked.append(world_size)

    def run(options: ToyOptions) -> None:
        module.ran.append(options.size)

    run.__module__ = "toy_stage"
    module.STAGE = Stage("toy", "A toy.", ToyOptions, run, check)
    monkeypatch.setitem(sys.modules, "toy_stage", module)
    monkeypatch.setitem(cli.COMMANDS, "toy", cli.Command("toy_stage", "a toy"))
    return module


def _children_cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def test_a_terminal_without_utf8_shows_the_help() -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "0"}
    line = [sys.executable, "-m", "launch.cli", "--help"]
    done = subprocess.run(line, capture_output=True, env=environment, timeout=100)
    assert (done.returncode, done.stderr) == (0, b"") and b"usage: " in done.stdout


def test_a_reader_that_goes_away_ends_it_in_silence() -> None:
    """As `slimstate --help | head -1` does; the reader is gone before a word is written."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([*COMMAND, "--help"], cwd=ROOT, stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")
