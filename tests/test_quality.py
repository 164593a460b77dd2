"""What holds for the code as a whole: style, types, and which package may import which."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

LAYERS = ("kernels", "flame", "pruning", "launch")
"""Our packages: each may import itself and those before it."""

FLAME_FOR_PRUNING = {
    "checkpoint", "config", "data", "errors", "hugging_face", "model", "models", "options",
    "process", "recipe", "register", "stage", "storage", "versions",
}  # fmt: skip
"""Rooms of flame that pruning may use: what it reads, writes and says, not how flame trains."""

OBJECTIVE = "flame.training.objective."
"""The exception: the loss whose gradients a calibration sums."""

MATHEMATICS = (
    "layouts", "spaces", "linalg", "state_rank", "replay", "statistics", "methods",
    "planning.budgets", "planning.per_kind", "planning.allocation", "repair.output_fit",
    "repair.low_rank",
)  # fmt: skip
"""Modules of pruning that import torch and nothing built on it."""

STAGES = {
    "flame": {"tokenizer", "train", "convert"},
    "pruning": {"calibrate", "plan", "apply", "prune"},
    "launch": {
        "cli",
        "evaluate",
        "recall",
        "analyze",
        "bench",
        "capacity",
        "serve_check",
        "sweep",
        "shrink",
        "report",
        "demo",
        "shipped",
    },
}
"""Modules at the top of each package that are started by name; its folders are rooms."""

FOREIGN_KERNELS = {"backends", "benchmark", "cli", "install", "layer", "load", "utils"}
"""Submodules of the Hugging Face package that is also called `kernels`."""


@pytest.mark.parametrize(
    "command",
    [["ruff", "check", "--no-cache"], ["ruff", "format", "--check", "--no-cache"], ["mypy"]],
    ids=["ruff check", "ruff format", "mypy"],
)
def test_tools_have_no_complaint(command: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("package", LAYERS)
def test_imports_point_one_way(package: str) -> None:
    above = set(LAYERS[LAYERS.index(package) + 1 :])
    wrong = [
        f"{file.relative_to(ROOT)}:{line} imports {name}"
        for file, line, name in _imports(package)
        if name.partition(".")[0] in above
    ]
    assert wrong == []


@pytest.mark.parametrize("package", STAGES)
def test_no_room_imports_a_stage(package: str) -> None:
    stages = {f"{package}.{name}" for name in STAGES[package]}
    wrong = [
        f"{file.relative_to(ROOT)}:{line} imports {name}"
        for file, line, name in _imports(package)
        if file.parent != ROOT / package and (name in stages or name.rpartition(".")[0] in stages)
    ]
    assert wrong == []


@pytest.mark.parametrize("package", LAYERS)
def test_modules_can_be_read_at_a_sitting(package: str) -> None:
    """The exception is one algorithm, strong rank-revealing QR with its updates."""
    lines = {str(f.relative_to(ROOT)): f.read_text().count("\n") for f in _files(package)}
    long = {name for name, count in lines.items() if count > 250}
    assert long <= {"pruning/linalg.py"}


@pytest.mark.parametrize("package", LAYERS)
def test_rooms_are_not_warehouses(package: str) -> None:
    folders = {file.parent for file in _files(package)}
    modules = {folder: len(list(folder.glob("*.py"))) for folder in folders}
    assert {folder: count for folder, count in modules.items() if count > 16} == {}


def test_pruning_does_not_know_how_flame_trains() -> None:
    wrong = [
        f"{file.relative_to(ROOT)}:{line} imports {name}"
        for file, line, name in _imports("pruning")
        if name.startswith("flame.")
        and name.split(".")[1] not in FLAME_FOR_PRUNING
        and not name.startswith(OBJECTIVE)
    ]
    assert wrong == []


def test_torchtitan_is_met_in_flame_alone() -> None:
    packages = [package for package in LAYERS if package != "flame"]
    wrong = [
        f"{file.relative_to(ROOT)}:{line} imports {name}"
        for package in packages
        for file, line, name in _imports(package)
        if name.partition(".")[0] == "torchtitan"
    ]
    assert wrong == []


def test_mathematics_needs_torch_alone() -> None:
    modules = ", ".join(f"pruning.{name}" for name in MATHEMATICS)
    loaded = _loaded_by(f"import {modules}")
    assert "torch" in loaded
    assert not loaded & {"torchtitan", "transformers", "fla", "peft", "datasets", "tokenizers"}


def test_mathematics_names_torch_alone() -> None:
    allowed = {"torch", "jaxtyping", "flame", "pruning"} | set(sys.stdlib_module_names)
    paths = [ROOT / "pruning" / name.replace(".", "/") for name in MATHEMATICS]
    files = [file for path in paths for file in _module_files(path)]
    wrong = [
        f"{file.relative_to(ROOT)}:{line} imports {name}"
        for file in files
        for line, name in _imported_names(file)
        if name.partition(".")[0] not in allowed
    ]
    assert len(files) >= len(MATHEMATICS)
    assert wrong == []


@pytest.mark.parametrize("module", ["flame", "flame.errors", "launch.cli", "launch.drawing.table"])
def test_light_modules_load_no_torch(module: str) -> None:
    assert not _loaded_by(f"import {module}") & {"torch", "numpy", "transformers"}


def test_kernels_is_a_namespace() -> None:
    folder = ROOT / "kernels"
    assert not (folder / "__init__.py").exists()
    assert not {path.stem for path in folder.iterdir()} & FOREIGN_KERNELS
    others = [ROOT / package for package in LAYERS if package != "kernels"]
    lacking = [
        path.relative_to(ROOT)
        for package in others
        for path in {package, *(file.parent for file in package.rglob("*.py"))}
        if not (path / "__init__.py").exists()
    ]
    assert lacking == []


def test_modules_are_named_by_what_they_do() -> None:
    names = {"utils.py", "helpers.py", "common.py", "util.py", "misc.py"}
    assert [file for file in _files(*LAYERS, "tests", "benchmarks") if file.name in names] == []


def _imports(package: str) -> Iterator[tuple[Path, int, str]]:
    """File, line and full name of every import in a package, inside functions too."""
    for file in _files(package):
        for line, name in _imported_names(file):
            yield file, line, name


def _imported_names(file: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(file.read_text(), str(file))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: write imports from the root"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def _files(*folders: str) -> list[Path]:
    return [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]


def _module_files(path: Path) -> list[Path]:
    return sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]


def _loaded_by(statement: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"{statement}; import sys; print(*sys.modules)"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.split())
