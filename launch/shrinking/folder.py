"""The folder of a shrinking.

shrink.json     what its phases depend on; others are refused in this folder
start/          the model with the channels that go before the first step, if some do
phase-N/        the run folder of a phase
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flame.checkpoint.reference import CHECKPOINT_FOLDER
from flame.checkpoint.steps import latest_whole_step
from flame.errors import UserError
from flame.process.output_checks import check_place
from flame.storage.json_file import read_object_if_any, write_object
from launch.shrinking.schedule import Phase

SETTINGS_FILE = "shrink.json"
KIND = "shrink settings"
FORMAT = 1


@dataclass(frozen=True)
class ShrinkFolder:
    path: Path

    @property
    def start(self) -> Path:
        return self.path / "start"

    def run(self, phase: Phase) -> Path:
        """The run folder of a phase."""
        return self.path / f"phase-{phase.number}"

    def before(self, phase: Phase) -> Path:
        """The run folder of the phase before a phase that is not the first."""
        return self.path / f"phase-{phase.number - 1}"

    def steps_done(self, phase: Phase) -> int | None:
        """The last whole step in a phase's run folder; None if it has none."""
        return latest_whole_step(self.run(phase) / CHECKPOINT_FOLDER)

    def check(self, settings: Mapping[str, Any]) -> None:
        """Raise UserError for a folder that is no shrinking, or one with other settings."""
        check_place(self.path)
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"output {self.path} is a file: choose a folder")
        if not self.path.exists() or not any(self.path.iterdir()):
            return
        begun = read_object_if_any(self.path / SETTINGS_FILE)
        if begun.get("kind") != KIND:
            raise UserError(f"{self.path} is not empty and no shrinking: choose another folder")
        for key, value in _content(settings).items():
            if begun.get(key) != value:
                raise UserError(
                    f"{self.path} was begun with {key} {json.dumps(begun.get(key))}, not "
                    f"{json.dumps(value)}: choose another folder"
                )

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Make the folder ready. One process does it alone."""
        self.path.mkdir(parents=True, exist_ok=True)
        if not (self.path / SETTINGS_FILE).is_file():
            write_object(self.path / SETTINGS_FILE, _content(settings))


def _content(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the file holds, as JSON gives it back."""
    return json.loads(json.dumps({"kind": KIND, "format": FORMAT, **settings}))
