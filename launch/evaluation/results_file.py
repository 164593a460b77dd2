"""Results of an evaluation in a file, model by model, so that a call resumes an interrupted one.

A single model's record is the file's top level; several are under `models`, with what each loses
more than the first of them under `differences`.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flame.checkpoint.reference import ModelReference
from flame.errors import UserError
from flame.process.output_checks import check_file_output
from flame.storage.json_file import read_object_if_any
from launch.evaluation.intervals import differences
from launch.reporting.envelope import enveloped, write_result

SETTINGS = "settings"
IDENTITY = "identity"

Record = dict[str, Any]


@dataclass
class ResultsFile:
    """The records of models, by the names that they were given, and the file that keeps them."""

    path: Path | None
    """None keeps nothing."""

    settings: Mapping[str, Any]
    """What was measured and how; results under other settings are not taken over."""

    several: bool
    command: str
    """The command line that measures."""
    overwrite: bool = False
    records: dict[str, Record] = field(default_factory=dict)

    def check(self, inside: Sequence[Path] = ()) -> None:
        """Read what the file holds; raise UserError if it has other settings or cannot be written.

        Args:
            inside: folders that the file must not lie in (the models').
        """
        if self.path is None:
            return
        for folder in inside:
            check_file_output(self.path, True, inside=folder)
        if not self.overwrite:
            self.records = _resumable(self.path, self.settings)
            self.several = self.several or len(self.records) > 1
        check_file_output(self.path, self.overwrite or bool(self.records))

    def done(self, name: str, reference: ModelReference) -> Record | None:
        """The record of a model that has not changed since."""
        record = self.records.get(name)
        return record if record and record.get(IDENTITY) == identity(reference) else None

    def add(self, name: str, record: Record) -> None:
        """Keep `record`, and write the file. Call it within `measuring(path)`."""
        self.records[name] = record
        if self.path is None:
            return
        several = {
            SETTINGS: dict(self.settings),
            "models": self.records,
            "differences": {
                name: {"against": first, **found.record()}
                for first, name, found in differences(self.records)
            },
        }
        content = several if self.several or len(self.records) > 1 else record
        write_result(self.path, enveloped("eval", self.command, content), locked=True)


def identity(reference: ModelReference) -> str:
    """A mark of the files that a model's figures depend on: their names, sizes and times."""
    folders = [reference.weights, reference.folder]
    if reference.is_lora:
        folders.append(reference.base().weights)
    return files_mark(f for folder in folders for f in folder.iterdir() if _matters(f))


def files_mark(files: Iterable[Path]) -> str:
    """A hash of the names, sizes and times of `files`."""
    stats = [(str(file), file.stat()) for file in sorted(set(files))]
    lines = [f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _matters(file: Path) -> bool:
    """Whether a file is of the model; logs, plans and records beside it are not."""
    from flame.checkpoint.reference import ADAPTER_FILE, BASE_FILE, CONFIG_FILE
    from flame.hugging_face.companions import TOKENIZER_FILES

    names = (ADAPTER_FILE, BASE_FILE, CONFIG_FILE, ".metadata", *TOKENIZER_FILES)
    return file.name in names or file.suffix in (".safetensors", ".distcp", ".bin")


def _resumable(path: Path, settings: Mapping[str, Any]) -> dict[str, Record]:
    """The records in `path`; none if there is no such file, or it is not a file of records."""
    content = read_object_if_any(path)
    if SETTINGS not in content:
        return {}
    if content[SETTINGS] != json.loads(json.dumps(settings)):
        raise UserError(
            f"output {path} exists and holds results under other settings: "
            "choose another, or pass --overwrite to replace it"
        )
    models = content.get("models", {content.get("model"): content})
    return {name: record for name, record in models.items() if isinstance(record, dict)}
