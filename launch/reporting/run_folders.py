"""Run folders for a report: which there are, how each came about, and the JSON files there."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flame.errors import UserError

PLAN_FILE = "plan.json"
RECIPE_FILE = "recipe.toml"

LARGEST = 32 * 2**20
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
    steps: Sequence[int] = ()
    """Its whole steps, increasing; none in a Hugging Face folder."""

    base: Mapping[str, Any] = field(default_factory=dict)
    """Its base.json, if it was trained with adapters: reference and fingerprint of the base."""

    @property
    def step(self) -> int | None:
        """Its last whole step."""
        return self.steps[-1] if self.steps else None

    @property
    def made_from(self) -> str | None:
        """The fingerprint of the model that it was pruned from, or that its adapters are on."""
        found = self.base if self.plan is None else self.plan
        mark = found.get("fingerprint")
        return mark if isinstance(mark, str) else None

    @property
    def start(self) -> str | None:
        """What its training started from, if not from scratch: a reference to a model."""
        section = self.recipe.get("model")
        start = section.get("init") if isinstance(section, dict) and self.has_losses else None
        return start if isinstance(start, str) and start else None

    def tokens_of(self, steps: int | None) -> int | None:
        """The tokens of so many of its training steps; None if the recipe does not say."""
        section = self.recipe.get("training")
        sizes = section if isinstance(section, dict) else {}
        batch, length = sizes.get("global_batch_size"), sizes.get("seq_len")
        if steps is None or not isinstance(batch, int) or not isinstance(length, int):
            return None
        return steps * batch * length if batch > 0 and length > 0 else None


def find_runs(paths: Sequence[Path]) -> dict[str, RunFolder]:
    """Return the runs in `paths`, each a run or a folder of runs, by their folders' names.

    Where two folders have one name, the later gets as much of its path as tells them apart.

    Raises:
        UserError: a path is missing, no folder, or holds no run.
    """
    folders = dict.fromkeys(folder for path in paths for folder in _run_folders(path))
    names: dict[str, RunFolder] = {}
    for folder in folders:
        names[_name(folder, names)] = _read(folder)
    return names


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
    from flame.checkpoint.reference import BASE_FILE, read_config
    from flame.checkpoint.steps import whole_steps
    from flame.recipe import read_tables
    from flame.storage.json_file import read_object, read_object_if_any

    plan, recipe = folder / PLAN_FILE, folder / RECIPE_FILE
    checkpoint = folder / "checkpoint"
    return RunFolder(
        folder=folder,
        config=read_config(folder / "config.json"),
        plan=read_object(plan) if plan.is_file() else None,
        recipe=read_tables(recipe) if recipe.is_file() else {},
        has_losses=any(folder.glob("tb/**/events.out.*")),
        steps=whole_steps(checkpoint) if checkpoint.is_dir() else (),
        base=read_object_if_any(folder / BASE_FILE),
    )


def _name(folder: Path, taken: Mapping[str, RunFolder]) -> str:
    name, parents = folder.name, list(folder.parents)
    while name in taken and parents:
        name = f"{parents.pop(0).name}/{name}"
    return name


BUDGET_OPTIONS = (
    "ratio",
    "width",
    "state_bytes",
    "space",
    "multiple_of",
    "allocate",
    "floor",
    "for",
)


def _pruning_words(run: RunFolder, runs: Mapping[str, RunFolder]) -> list[str]:
    assert run.plan is not None
    plan = run.plan
    before = plan.get("config_before")
    source = next(
        (str(r.folder) for r in runs.values() if r.plan is None and r.config == before), "MODEL"
    )
    method, budget = plan.get("method", {}), plan.get("budget", {})
    words = [source, str(run.folder), "--method", str(method.get("name", "?"))]
    repair = plan.get("repair") or {}
    calibration = plan.get("calibration") or repair.get("calibration") or {}
    asked = {
        "repair": repair.get("kind"),
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


def check_results(results: Sequence[Path]) -> None:
    """Raise UserError for one of `--results` that is not there."""
    for path in results:
        if not path.exists():
            raise UserError(f"--results {path}: no such file or folder")


def result_files(places: Sequence[Path], named: Sequence[Path] = ()) -> list[Path]:
    """Return JSON files, oldest first, that may be results: in `places` and folders there.

    Args:
        places: folders that are searched.
        named: files, and folders to search, that were asked for.
    """
    searched = [*places, *(path.resolve() for path in named if path.is_dir())]
    patterns = ("*.json", "*/summary.json", "*/results.json")
    found = {path for place in searched for pattern in patterns for path in _files(place, pattern)}
    found |= {path.resolve() for path in named if not path.is_dir()}
    return sorted(found, key=lambda path: (path.stat().st_mtime_ns, str(path)))


def _files(place: Path, pattern: str) -> list[Path]:
    """Return files of at most `LARGEST` bytes; none if the folder cannot be read."""
    try:
        return [p for p in place.glob(pattern) if p.is_file() and p.stat().st_size <= LARGEST]
    except OSError:
        return []
