"""The folder of a sweep: what was asked for, the statistics, and a record for each point.

    sweep.json              the options that points depend on; others are refused in this folder
    statistics/             of the one calibration
    points/NAME.json        a measured point
    plans/NAME/             its plan, for `slimstate apply`
    logs/NAME.log           what its stages said
    models/NAME/            pruned/ and recovered/, while it is measured or with --keep
    results.json, .csv, .md, .tex, sweep.html

A point that failed has points/NAME.failed with the reason, until the sweep runs again. A point
belongs to the process that holds the lock .claims/NAME; the lock goes with the process.
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flame.errors import UserError
from flame.process.atomic_output import replacing_file
from flame.process.file_lock import file_lock
from flame.process.output_checks import MADE, check_made_here, check_place, mark_as_made
from flame.storage.json_file import read_object, read_object_if_any

SETTINGS_FILE = "sweep.json"
FORMAT = 3
"""Version of what records hold; a sweep that another version began is refused."""

KIND = "sweep"

PAGE_FILE = "sweep.html"
RESULTS_FILES = tuple(f"results.{suffix}" for suffix in ("json", "csv", "md", "tex"))

CONTENT = (
    SETTINGS_FILE, "statistics", "points", "plans", "logs", "models", ".claims", PAGE_FILE,
    *RESULTS_FILES,
)  # fmt: skip
"""What a sweep makes in its folder."""

Record = dict[str, Any]


@dataclass(frozen=True)
class SweepFolder:
    path: Path

    @property
    def statistics(self) -> Path:
        return self.path / "statistics"

    def log(self, name: str) -> Path:
        return self.path / "logs" / f"{name}.log"

    def models(self, name: str) -> Path:
        return self.path / "models" / name

    def check(self, settings: Mapping[str, Any], overwrite: bool, inside: Path) -> None:
        """Refuse a folder that cannot be written, is not a sweep, or is one with other settings.

        Args:
            settings: what the points depend on.
            overwrite: the folder's content will be removed.
            inside: the model's folder, which the sweep must not lie in.
        """
        check_place(self.path, inside=inside)
        if inside.resolve().is_relative_to(self.path.resolve()):
            raise UserError(f"output {self.path} holds the model {inside}: choose another")
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"output {self.path} is a file: choose a folder")
        if not self.path.exists() or not any(self.path.iterdir()):
            return
        begun = self._settings()
        if overwrite:
            return check_made_here(self.path)
        for key, value in _plain(settings).items():
            # What was left open, a recovery, may be said later; what was said may be left out.
            if value is None or begun.get(key) is None:
                continue
            if begun[key] != value:
                raise UserError(
                    f"{self.path} was begun with {key} {_short(begun.get(key))}, not "
                    f"{_short(value)}: choose another folder, or pass --overwrite"
                )

    def begin(self, settings: Mapping[str, Any], overwrite: bool) -> None:
        """Make the folder ready for the workers. One process does it alone."""
        if overwrite and (self.path / SETTINGS_FILE).is_file():
            self._remove()
        # First, so that a folder without it is somebody else's.
        begun = read_object_if_any(self.path / SETTINGS_FILE)
        said = {key: value for key, value in settings.items() if value is not None}
        _write(self.path / SETTINGS_FILE, {"kind": f"{KIND} settings", **begun, **said})
        mark_as_made(self.path, CONTENT)
        for name in ("points", "plans", "logs", ".claims"):
            (self.path / name).mkdir(exist_ok=True)
        for failed in (self.path / "points").glob("*.failed"):
            failed.unlink()

    def withdraw(self) -> None:
        """Remove the folder if it has neither statistics nor points."""
        if not self.statistics.exists() and not any((self.path / "points").iterdir()):
            self._remove()

    def _remove(self) -> None:
        """Remove the folder, what marks it last: a job that is killed here leaves a sweep."""
        for path in self.path.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name not in (SETTINGS_FILE, MADE):
                path.unlink()
        shutil.rmtree(self.path)

    def record(self, name: str) -> Record | None:
        """What was measured of a point; None if it was not, or is not to be trusted."""
        return read_object_if_any(self.path / "points" / f"{name}.json") or None

    def keep(self, name: str, record: Mapping[str, Any]) -> None:
        _write(self.path / "points" / f"{name}.json", record)

    def failure(self, name: str) -> str | None:
        """Why a point failed in this run, in one line."""
        try:
            return (self.path / "points" / f"{name}.failed").read_text(encoding="utf-8")
        except OSError:
            return None

    def fail(self, name: str, reason: str) -> None:
        path = self.path / "points" / f"{name}.failed"
        with replacing_file(path, overwrite=True) as temporary:
            temporary.write_text(" ".join(reason.split()), encoding="utf-8")

    def has(self, name: str, stages: Sequence[str]) -> bool:
        """Whether a point was measured in all of these stages."""
        record = self.record(name)
        return record is not None and all(stage in record for stage in stages)

    def is_settled(self, name: str, stages: Sequence[str] = ()) -> bool:
        return self.has(name, stages) or self.failure(name) is not None

    def open_points(self, wanted: Mapping[str, Sequence[str]]) -> Iterator[str]:
        """Points to measure, each claimed for this process until it asks for the next.

        Args:
            wanted: the stages to measure each point in, by its name.
        """
        for name, stages in wanted.items():
            with self._claim(name) as claimed:
                if claimed and not self.is_settled(name, stages):
                    yield name

    @contextmanager
    def _claim(self, name: str) -> Iterator[bool]:
        with file_lock(self.path / ".claims" / name) as holder:
            yield holder is None

    def keep_plan(self, name: str, pruned: Path) -> Record:
        """Copy the plan out of a pruned model; returns its content."""
        plan = read_object(pruned / "plan.json")
        folder = self.path / "plans" / name
        folder.mkdir(exist_ok=True)
        shutil.copy(pruned / "plan.json", folder)
        replaced = plan.get("replaced")
        if isinstance(replaced, dict) and (pruned / str(replaced.get("file"))).is_file():
            shutil.copy(pruned / str(replaced["file"]), folder)
        return plan

    def _settings(self) -> Record:
        content = read_object_if_any(self.path / SETTINGS_FILE)
        if content.get("kind") != f"{KIND} settings":
            raise UserError(f"{self.path} is not empty and no sweep: choose another folder")
        return content


def _write(path: Path, content: Mapping[str, Any]) -> None:
    with replacing_file(path, overwrite=True) as temporary:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _plain(settings: Mapping[str, Any]) -> Record:
    """`settings` as JSON gives them back."""
    return json.loads(json.dumps(settings))


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
