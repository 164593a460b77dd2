"""The set-up scripts, with a Python and a pip that only pretend."""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

STUB_PYTHON = """#!/bin/bash
# Understands what setup.sh asks of a Python, and logs the rest to calls.
here=$(dirname "$0")
case "$*" in
    "-V") echo "Python ${STUB_VERSION:-3.11.2}" ;;
    "-c import sys;"*) [[ -z $STUB_OLD ]] ;;
    "-c import venv, ensurepip") [[ -z $STUB_NO_VENV ]] ;;
    "-c "*) exit 0 ;;
    "-m venv "*) mkdir -p .venv/bin && cp "$0" .venv/bin/python && echo venv >>calls ;;
    "-m pip install "*)
        echo "pip ${!#}" >>calls
        sleep "${STUB_SLEEP:-0}"
        [[ -z $STUB_PIP_FAILS || ${!#} != "$STUB_PIP_FAILS" ]] || exit 1
        printf '#!/bin/bash\\necho "slimstate $*"\\n' >.venv/bin/slimstate
        chmod +x .venv/bin/slimstate ;;
    "-m pytest "*) echo "${CUDA_VISIBLE_DEVICES+CUDA_VISIBLE_DEVICES= }$*" ;;
    *) echo "unexpected: $*" >&2; exit 9 ;;
esac
"""
INSTALLED = ["venv", "pip torch", "pip .[dev]"]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with the scripts, and `bin/` with a pretended python3 to put on the path."""
    (tmp_path / "launch").mkdir()
    for name in ("setup.sh", "demo.sh", "test.sh"):
        shutil.copy(ROOT / "launch" / name, tmp_path / "launch")
    for name in ("pyproject.toml", "constraints.txt", ".ci/run"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    _write_stub(tmp_path / "bin" / "python3")
    return tmp_path


def test_demo_sets_up_once(checkout: Path) -> None:
    for _ in range(2):
        done = _run(checkout, "launch/demo.sh", "--out", "a b")
        assert (done.returncode, done.stdout) == (0, "slimstate demo --out a b\n"), done.stderr
    assert _calls(checkout) == INSTALLED


def test_tests_are_run_without_the_slow_ones(checkout: Path) -> None:
    done = _run(checkout, ".ci/run", cwd=checkout.parent)
    assert done.stdout == "-m pytest -m not slow\n"
    done = _run(checkout, "launch/test.sh", "-k", "table")
    assert done.stdout == "-m pytest -m not slow -k table\n"
    assert _calls(checkout) == INSTALLED


def test_with_a_gpu_the_tests_of_cpus_see_no_device(checkout: Path) -> None:
    with (checkout / "launch/setup.sh").open("a") as file:
        file.write("has_gpu() { true; }\ncheck_compiler() { true; }\n")
    done = _run(checkout, "launch/test.sh", "-k", "table")
    assert done.stdout.splitlines() == [
        "CUDA_VISIBLE_DEVICES= -m pytest -m not slow and not gpu -k table",
        "-m pytest -m not slow and gpu -k table",
    ]


def test_every_test_that_needs_a_gpu_carries_the_mark() -> None:
    for file in (ROOT / "tests").rglob("*.py"):
        text = file.read_text()
        if "skipif(not torch.cuda" in text:
            assert "pytest.mark.gpu" in text, file


def test_changed_requirements_are_installed(checkout: Path) -> None:
    _run(checkout, "launch/demo.sh")
    with (checkout / "constraints.txt").open("a") as file:
        file.write("tqdm==4.0\n")
    _run(checkout, "launch/demo.sh")
    assert _calls(checkout) == INSTALLED * 2


@pytest.mark.parametrize("broken", ["torch", ".[dev]"])
def test_failed_set_up_is_done_again(checkout: Path, broken: str) -> None:
    done = _run(checkout, "launch/demo.sh", STUB_PIP_FAILS=broken)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("slimstate: pip could not install")
    assert _run(checkout, "launch/demo.sh").returncode == 0
    assert _calls(checkout)[-3:] == INSTALLED


def test_killed_set_up_is_done_again(checkout: Path) -> None:
    process = _start(checkout, "launch/demo.sh", STUB_SLEEP="1")
    while not (checkout / "calls").exists():
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert _run(checkout, "launch/demo.sh").returncode == 0
    assert _calls(checkout)[-3:] == INSTALLED


def test_two_set_ups_at_once_install_once(checkout: Path) -> None:
    both = [_start(checkout, "launch/demo.sh", STUB_SLEEP="0.5") for _ in range(2)]
    outputs = [process.communicate(timeout=60) for process in both]
    assert [out for out, _ in outputs] == ["slimstate demo\n"] * 2
    assert sum("another set-up is running here" in err for _, err in outputs) == 1
    assert _calls(checkout) == INSTALLED


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        (
            {"STUB_NO_VENV": "1"},
            "slimstate: python3 lacks the venv module: apt-get install python3-venv",
        ),
        (
            {"STUB_OLD": "1", "STUB_VERSION": "3.9.2"},
            "slimstate: python3 is Python 3.9.2, but 3.11 or newer is needed: "
            "set SLIMSTATE_PYTHON to one",
        ),
        (
            {"SLIMSTATE_PYTHON": "/nowhere/python"},
            "slimstate: SLIMSTATE_PYTHON is /nowhere/python, which is no program",
        ),
    ],
)
def test_what_is_lacking_is_one_line(checkout: Path, variables: dict[str, str], line: str) -> None:
    done = _run(checkout, "launch/demo.sh", **variables)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"{line}\n")
    assert not (checkout / "calls").exists()


def test_no_python_is_one_line(checkout: Path) -> None:
    (checkout / "bin" / "python3").unlink()
    done = _run(checkout, "launch/demo.sh")
    assert done.stderr == "slimstate: no python3 found: apt-get install python3 python3-venv\n"


def test_newer_python_is_found(checkout: Path) -> None:
    (checkout / "bin" / "python3").write_text("#!/bin/bash\nexit 1\n")
    _write_stub(checkout / "bin" / "python3.12")
    assert _run(checkout, "launch/demo.sh").returncode == 0
    assert _calls(checkout) == INSTALLED


def _write_stub(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(STUB_PYTHON)
    path.chmod(0o755)


def _start(
    checkout: Path, script: str, *arguments: str, cwd: Path | None = None, **variables: str
) -> subprocess.Popen[str]:
    bash = shutil.which("bash")
    assert bash is not None
    return subprocess.Popen(
        [bash, checkout / script, *arguments],
        cwd=cwd or checkout,
        env={"PATH": f"{checkout / 'bin'}:{_tools(checkout)}", "HOME": os.environ["HOME"]}
        | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _run(
    checkout: Path, script: str, *arguments: str, cwd: Path | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    process = _start(checkout, script, *arguments, cwd=cwd, **variables)
    out, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess(script, process.returncode, out, err)


def _tools(checkout: Path) -> Path:
    """A folder with the system's tools that the scripts use, and no Python."""
    folder = checkout / "tools"
    folder.mkdir(exist_ok=True)
    names = "bash basename cat chmod cksum cp dirname flock mkdir rm sleep"
    for name in names.split():
        found, link = shutil.which(name), folder / name
        if found and not link.exists():
            link.symlink_to(found)
    return folder


def _calls(checkout: Path) -> list[str]:
    return (checkout / "calls").read_text().splitlines()
