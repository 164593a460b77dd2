"""The models that a recovery run depends on, recorded in its run folder: LoRA base and teacher.

A run that goes on must depend on the same ones, which their fingerprints show.
"""

import os
from pathlib import Path
from typing import Any

from flame.checkpoint.fingerprint import fingerprint
from flame.checkpoint.reference import BASE_FILE, resolve
from flame.errors import UserError
from flame.recovery.lora import write_adapter_files
from flame.storage.json_file import read_object, write_object

TEACHER_FILE = "teacher.json"
"""In a run folder: reference and fingerprint of the teacher."""


def record_base(job: Any, into: Path, config: dict[str, Any]) -> None:
    """Write a LoRA run's base and peft's `adapter_config.json` into the folder `into`.

    Args:
        config: the base's `config.json`.

    Raises:
        UserError: the run folder, `job.job.dump_folder`, records another base.
    """
    folder, init = Path(job.job.dump_folder), job.model.init
    base, recorded = resolve(init), folder / BASE_FILE
    own = fingerprint(base.config, base.source())
    if recorded.is_file() and read_object(recorded).get("fingerprint") != own:
        raise UserError(
            f"{init} is not the base that the adapters in {folder} were trained on: "
            "give that base, or another job.dump_folder"
        )
    # A relative step folder stays right when the base trains on and when both runs are moved.
    name = os.path.relpath(base.weights, folder) if Path(init).exists() else init
    write_adapter_files(into, job.lora, name, own, config)


def record_teacher(name: str, folder: Path, into: Path) -> None:
    """Write the model reference `name` of a teacher into the folder `into`.

    Raises:
        UserError: the run folder `folder` records another teacher.
    """
    reference, path = resolve(name), folder / TEACHER_FILE
    own = fingerprint(reference.config, reference.source())
    if path.is_file() and (recorded := read_object(path)).get("fingerprint") != own:
        raise UserError(
            f"{name} is not the teacher that {folder} learnt from ({recorded.get('reference')}): "
            "give that one, or another job.dump_folder"
        )
    record = {"reference": str(reference.weights), "fingerprint": own}
    write_object(into / TEACHER_FILE, record)
