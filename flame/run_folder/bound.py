"""What a run is bound to: the model, text and tokenizer of its steps cannot change as it goes on.

A run is bound to its architecture, the model that it started from, its tokenizer, its text, and the
keys in `BOUND`: they fix what its numbers mean, or what its data position points to. They are
compared by content where there is any, so a model or text may have moved. Another value of another
key is allowed, and recorded with the step at which it changed.

`run.json` in the run folder holds what other files do not: the model that it started from, the
digest of its text, and the changes.
"""

import dataclasses
import json
import logging
import os
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any, TypedDict

from flame.checkpoint.fingerprint import canonical_config, fingerprint
from flame.checkpoint.reference import CONFIG_FILE, RECIPE_FILE, read_config
from flame.data.documents import Documents
from flame.data.tokenizer import load_tokenizer
from flame.errors import UserError
from flame.recipe.paths import in_run_folder
from flame.recovery.adapter_scaling import used
from flame.run_folder.identity import text_digest, tokenizer_digest
from flame.run_folder.origin import named_config, own_tokenizer, steps_done
from flame.run_folder.start_model import start_model
from flame.storage.json_file import read_object, write_object

RUN_FILE = "run.json"
"""In a run folder: what the run is bound to, and how its recipe changed."""

BOUND = (
    "training.seq_len",
    "data.virtual_shards",
    "data.shuffle",
    "data.seed",
    "data.add_eos",
    "data.varlen",
    "data.weights",
    "lora.rank",
    "lora.dora",
    "lora.bias",
    "lora.target_modules",
    "lora.train_also",
    "trainable.modules",
)
"""Keys whose value a run keeps."""

PLACES = (
    *("job.dump_folder", "job.config_file", "checkpoint.load_step"),
    *("model.config", "data.tokenizer"),
)
"""Keys whose change is none of the run."""


class Start(TypedDict):
    reference: str
    fingerprint: str


Change = TypedDict("Change", {"step": int, "key": str, "from": Any, "to": Any})


class Record(TypedDict):
    """The content of `run.json`."""

    init: Start | None
    text: str
    changes: list[Change]


log = logging.getLogger(__name__)


def check_steps(job: Any) -> None:
    """Raise UserError if the run has done more steps than `job` asks for."""
    done = steps_done(job)
    if done is not None and done > job.training.steps:
        raise UserError(
            f"{job.job.dump_folder} has done {done} steps and training.steps is "
            f"{job.training.steps}: give more than {done} to train on"
        )


def check_bound(job: Any, documents: Documents) -> None:
    """Raise UserError, naming the key, if `job` goes on with a run that is bound to something else.

    Args:
        job: a `flame.config.JobConfig`; one that starts a new run passes.
        documents: the text that it names.
    """
    done, folder = steps_done(job), Path(job.job.dump_folder)
    if done is None:
        return
    # Step 0 holds a model alone, whose data and adapters begin anew.
    if done > 0:
        _check_keys(job, folder)
    _check_config(job, folder)
    _check_init(job, folder)
    _check_tokenizer(job, folder)
    recorded = _record(folder)
    if recorded is not None and recorded["text"] != text_digest(documents):
        raise _other(folder, f"data.dataset {documents.name}", "other text than the run's")


def write_record(job: Any, documents: Documents, path: Path) -> None:
    """Write the record of `job`'s run to `path`, with what `job` changes in the run's recipe.

    A new run's start and text are recorded. A run that goes on keeps them; one without a record,
    such as a pruned run, has no start.
    """
    folder, done = Path(job.job.dump_folder), steps_done(job)
    record: Record = {"init": None, "text": "", "changes": []}
    if done is not None:
        record = _record(folder) or record
        changes = list(_changes(job, folder, done))
        for change in changes:
            said = (done, change["key"], change["to"], change["from"])
            log.info("after step %d %s is %r, and was %r", *said)
        record["changes"] += changes
    elif job.model.init:
        record["init"] = _start(job)
    record["text"] = record["text"] or text_digest(documents)
    write_object(path, record)


def _check_keys(job: Any, folder: Path) -> None:
    recorded = recorded_job(folder)
    for key in BOUND if recorded else ():
        before, now = attrgetter(key)(recorded), attrgetter(key)(job)
        if before != now:
            raise _other(folder, f"{key} {now}", f"and the run has {before}")


def _check_config(job: Any, folder: Path) -> None:
    if job.model.init or not job.model.config:
        return
    own, named = (
        json.loads(canonical_config(config))
        for config in (read_config(folder / CONFIG_FILE), named_config(job.model.config))
    )
    for key in sorted(own.keys() | named.keys()):
        if own.get(key) != named.get(key):
            raise _other(
                folder,
                f"model.config {job.model.config}",
                f"another model than the run's: {key} is {named.get(key)}, not {own.get(key)}",
            )


def _check_init(job: Any, folder: Path) -> None:
    """Check `model.init`. That of a LoRA run is compared when it is recorded as the base."""
    init, record = job.model.init, _record(folder)
    if not init or job.lora.rank > 0:
        return
    start = record["init"] if record else None
    if start is None:
        raise UserError(
            f"the run {folder} exists, and did not start from {init}: leave --init out to go on "
            "with it, or choose another job.dump_folder to start from that model"
        )
    same_place = start["reference"] in (init, os.path.abspath(Path(init).expanduser()))
    if same_place and not Path(start["reference"]).exists():
        return
    if _start(job)["fingerprint"] == start["fingerprint"]:
        return
    if not same_place:
        raise UserError(
            f"the run {folder} exists, and started from {start['reference']}, not from {init}: "
            "leave --init out to go on with it, or choose another job.dump_folder"
        )
    log.warning("slimstate: warning: %s has changed since %s started from it", init, folder)


def _check_tokenizer(job: Any, folder: Path) -> None:
    own = own_tokenizer(job)
    if not job.data.tokenizer or own is None:
        return
    named = load_tokenizer(job.data.tokenizer)
    if tokenizer_digest(named) != tokenizer_digest(own):
        raise _other(
            folder, f"data.tokenizer {job.data.tokenizer}", "another tokenizer than the run's"
        )


def _other(folder: Path, what: str, why: str) -> UserError:
    return UserError(
        f"cannot go on with {folder}: {what} is given, {why}; leave it as it was, or start a new "
        f"run from this one by --init {folder} and another job.dump_folder"
    )


def _record(folder: Path) -> Record | None:
    path = folder / RUN_FILE
    return read_object(path, shape=Record) if path.is_file() else None  # type: ignore[return-value]


def recorded_job(folder: Path) -> Any:
    """Return the job of a run folder's own recipe, None if it has none."""
    from flame.config import job_from_tables
    from flame.recipe import read_tables

    recipe = folder / RECIPE_FILE
    return job_from_tables(read_tables(recipe)) if recipe.is_file() else None


def _start(job: Any) -> Start:
    init, reference = job.model.init, start_model(job)
    path = Path(init).expanduser()
    return {
        "reference": os.path.abspath(path) if path.exists() else init,
        "fingerprint": fingerprint(reference.config, reference.source()),
    }


def _changes(job: Any, folder: Path, step: int) -> Iterator[Change]:
    recorded = recorded_job(folder)
    if recorded is None:
        return
    # The scale of adapters is checked elsewhere; the recipe records the one that is used.
    given = in_run_folder(dataclasses.replace(job, lora=used(job.lora)), folder)
    for section, values in dataclasses.asdict(given).items():
        for key, value in values.items():
            before = getattr(getattr(recorded, section), key)
            name = f"{section}.{key}"
            if before != value and name not in PLACES and not isinstance(value, dict):
                yield {"step": step, "key": name, "from": before, "to": value}
