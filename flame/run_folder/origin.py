"""Where a job's model and tokenizer come from: its run folder if it goes on, else its recipe."""

from pathlib import Path
from typing import Any

from flame.checkpoint.reference import (
    CONFIG_FILE,
    RECIPE_FILE,
    TOKENIZER_CONFIG,
    read_config,
)
from flame.checkpoint.steps import is_whole, latest_whole_step, step_folder
from flame.data.hub import hub_problem
from flame.data.mqar import is_mqar
from flame.data.mqar_tokens import mqar_tokenizer
from flame.data.tokenizer import load_tokenizer
from flame.errors import UserError, first_line
from flame.run_folder.start_model import start_model


def steps_done(job: Any) -> int | None:
    """Return the step that `job` goes on from, `checkpoint.load_step` or the latest; None if new.

    A `load_step` that is not there counts as none; `flame.training.start_checks` refuses it.
    """
    folder = Path(job.job.dump_folder) / job.checkpoint.folder
    asked = job.checkpoint.load_step
    if asked == -1:
        return latest_whole_step(folder)
    return asked if is_whole(step_folder(folder, asked)) else None


def model_config(job: Any) -> dict[str, Any]:
    """Return the `config.json` to train: that of a run that goes on, or what the recipe names.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    own = Path(job.job.dump_folder) / CONFIG_FILE
    named = job.model.init or job.model.config
    if own.is_file() and (steps_done(job) is not None or not named):
        return read_config(own)
    if job.model.init:
        return start_model(job).config
    if not job.model.config:
        raise UserError("no model: give model.config (a config.json) or --init MODEL")
    return named_config(job.model.config)


def named_config(name: str) -> dict[str, Any]:
    """Return the `config.json` that `model.config` names: a file, a folder's or a hub model's.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return read_config(path)
    if path.is_dir():
        return read_config(path / CONFIG_FILE)
    return hub_config(name)


def hub_config(name: str) -> dict[str, Any]:
    """Return the `config.json` of hub model `name`; UserError if neither cache nor hub has it."""
    from huggingface_hub import hf_hub_download

    problem = hub_problem()
    try:
        path = hf_hub_download(name, CONFIG_FILE, local_files_only=problem is not None)
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.config {name!r} is neither a file nor a folder, and not to be had from the hub "
            f"({problem or first_line(error)}): give a local config.json"
        ) from error
    return read_config(Path(path))


def tokenizer_of(job: Any) -> Any:
    """Load the tokenizer of a run that goes on, or what the recipe names, or that lies in the run.

    What the recipe names is `data.tokenizer`, that of `model.init`, or MQAR's own.

    Raises:
        UserError: there is none.
    """
    if steps_done(job) is not None and (own := own_tokenizer(job)) is not None:
        return own
    if job.data.tokenizer:
        return load_tokenizer(job.data.tokenizer)
    if (own := own_tokenizer(job)) is not None:
        return own
    if job.model.init:
        folder = start_model(job).tokenizer
        if folder is not None:
            return load_tokenizer(str(folder))
    if is_mqar(job.data.dataset):
        return mqar_tokenizer(job.data.dataset)
    raise UserError("no tokenizer: give data.tokenizer (a folder or a hub name)")


def own_tokenizer(job: Any) -> Any:
    """Return the tokenizer in the run folder; None unless it is whole.

    A killed start may leave a part of one: the recipe, but not the tokenizer's config.
    """
    run = Path(job.job.dump_folder)
    started, complete = (run / RECIPE_FILE).is_file(), (run / TOKENIZER_CONFIG).is_file()
    whole = complete or ((run / "tokenizer.json").is_file() and not started)
    return load_tokenizer(str(run)) if whole else None
