"""Run folders for a report: which there are, how each came about, and the JSON files there."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flame.errors import UserError
from launch.reporting.sentences import LABELS

PLAN_FILE = "plan.json"
RECIPE_FILE = "recipe.toml"

LARGEST = 16 * 2**20
"""Most bytes of a JSON file that is read."""


@dataclass(frozen=True)
class RunFolder:
    """A folder that holds a model, and what it says of itself."""

    folder: Path
    config: Mapping[str, Any]
    plan: Mapping[str, Any] | None
    """Its plan.json, if it was pruned here."""

    recipe: Mapping[str, Any] = field(default_factory=dict)
    has_losses: bool = False

    @property
    def init(self) -> Path | None:
        """The folder of the model that its training started from; None if there is none."""
        start = self.recipe.get("model", {}).get("init") if self.has_losses else None
        return Path(start).resolve() if start else None


def find_runs(paths: Sequence[Path]) -> dict[str, RunFolder]:
    """Return the runs in `paths`, each a run or a folder of runs, by the name of their row.

    Raises:
        UserError: a path is missing, no folder, or holds no run.
    """
    folders = dict.fromkeys(folder for path in paths for folder in _run_folders(path))
    runs = [_read(folder) for folder in folders]
    names: dict[str, RunFolder] = {}
    for run in sorted(runs, key=_order):
        names[_name(run, runs, names)] = run
    known = list(LABELS)
    return dict(
        sorted(names.items(), key=lambda item: known.index(item[0]) if item[0] in known else 99)
    )


def commands(runs: Mapping[str, RunFolder]) -> Iterator[str]:
    """Yield the commands that made the runs, as far as losses and plans tell."""
    for run in runs.values():
        if run.plan is not None and not run.has_losses:
            yield shlex.join(["slimstate", "prune", *_pruning_words(run, runs)])
        elif run.has_losses:
            recipe = str(run.folder / RECIPE_FILE)
            yield shlex.join(["slimstate", "train", "--config", recipe])


def is_run(folder: Path) -> bool:
    """Return whether a folder holds a model: a configuration, and checkpoints or weights."""
    weights = (folder / "checkpoint").is_dir() or any(folder.glob("*.safetensors"))
    return weights and (folder / "config.json").is_file()


def _run_folders(path: Path) -> list[Path]:
    if not path.exists():
        raise UserError(f"no run at {path}: no such folder")
    if not path.is_dir():
        raise UserError(f"{path} is a file: give a run folder, or a folder of runs")
    if is_run(path):
        return [path.resolve()]
    inside = sorted(child.resolve() for child in path.iterdir() if child.is_dir() and is_run(child))
    if not inside:
        raise UserError(f"{path} is no run and holds none: a run has config.json and checkpoint/")
    return [child for child in inside if (child / "checkpoint").is_dir()] or inside


def _read(folder: Path) -> RunFolder:
    from flame.checkpoint.reference import read_config
    from flame.recipe import read_tables
    from flame.storage.json_file import read_object

    plan, recipe = folder / PLAN_FILE, folder / RECIPE_FILE
    return RunFolder(
        folder=folder,
        config=read_config(folder / "config.json"),
        plan=read_object(plan) if plan.is_file() else None,
        recipe=read_tables(recipe) if recipe.is_file() else {},
        has_losses=any(folder.glob("tb/**/events.out.*")),
    )


def _order(run: RunFolder) -> tuple[int, str]:
    """Return a key that sorts folders named in `LABELS` first, so that they get those names."""
    return (0 if run.folder.name in LABELS else 1, run.folder.name)


def _name(run: RunFolder, runs: Sequence[RunFolder], taken: Mapping[str, RunFolder]) -> str:
    """Return the row's name: the folder's or `_part` if in `LABELS`, else an end of the path."""
    for name in (run.folder.name, _part(run, runs)):
        if name in LABELS and name not in taken:
            return name
    name, parents = run.folder.name, list(run.folder.parents)
    while name in taken or name in LABELS:
        name = f"{parents.pop(0).name}/{name}"
    return name


def _part(run: RunFolder, runs: Sequence[RunFolder]) -> str:
    """Return a name in `LABELS`, such as `pruned`, by how the run came about."""
    pruned = {other.folder for other in runs if other.plan is not None}
    if run.init is not None:
        start = next((folder for folder in (run.init, *run.init.parents) if is_run(folder)), None)
        was_pruned = start in pruned or (start is not None and (start / PLAN_FILE).is_file())
        return "recovered" if was_pruned else "dense_continued"
    if run.plan is None:
        return "dense"
    if run.has_losses:
        return "recovered"
    return "random" if run.plan.get("method", {}).get("name") == "random" else "pruned"


BUDGET_OPTIONS = ("ratio", "width", "state_bytes", "space", "multiple_of", "allocate")


def _pruning_words(run: RunFolder, runs: Mapping[str, RunFolder]) -> list[str]:
    assert run.plan is not None
    plan = run.plan
    before = plan.get("config_before")
    source = next(
        (str(r.folder) for r in runs.values() if r.plan is None and r.config == before), "MODEL"
    )
    method, budget = plan.get("method", {}), plan.get("budget", {})
    words = [source, str(run.folder), "--method", str(method.get("name", "?"))]
    calibration = plan.get("calibration") or {}
    asked = {
        **{name: budget.get(name) for name in BUDGET_OPTIONS},
        "pad": plan.get("pad"),
        **(method.get("options") or {}),
        **{name: calibration.get(name) for name in ("sequences", "seq_len")},
    }
    for name, value in asked.items():
        words += _option(name, value)
    return words


def _option(name: str, value: Any) -> list[str]:
    """Return the words of an option; none if it was not asked for."""
    flag = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return [flag] if value else []
    return [] if value is None else [flag, str(value)]


def places_beside(paths: Sequence[Path], runs: Mapping[str, RunFolder]) -> list[Path]:
    """Return folders to search for results: the parents of the runs, `paths`, and the runs."""
    folders = [run.folder for run in runs.values()]
    beside = [folder.parent for folder in folders]
    return list(dict.fromkeys([*beside, *(path.resolve() for path in paths), *folders]))


def result_files(places: Sequence[Path]) -> list[Path]:
    """Return JSON files, oldest first, that may be results: in `places` and folders there."""
    patterns = ("*.json", "*/summary.json", "*/results.json")
    found = {path for place in places for pattern in patterns for path in _files_in(place, pattern)}
    return sorted(found, key=lambda path: (path.stat().st_mtime_ns, str(path)))


def _files_in(place: Path, pattern: str) -> list[Path]:
    """Return files of at most `LARGEST` bytes; none if the folder cannot be read."""
    try:
        return [p for p in place.glob(pattern) if p.is_file() and p.stat().st_size <= LARGEST]
    except OSError:
        return []
