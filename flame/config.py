"""torchtitan's job configuration, made from a recipe's sections.

Its classes hold the keys of `flame.recipe.sections` beside torchtitan's own, which must keep their
defaults: a change of one is refused, since nothing here reads it, and some name modules that
torchtitan would import. Recipes are therefore never shown to torchtitan's own reader.
"""

import flame.process.titan_cpu  # noqa: F401  (must precede torchtitan)

# isort: split
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchtitan.config import job_config as titan

from flame.checkpoint.reference import CHECKPOINT_FOLDER, CONFIG_FILE, RECIPE_FILE
from flame.errors import UserError
from flame.recipe import read_tables, recipe_path
from flame.recipe.keys import fill, keys_of, sections, unknown_key
from flame.recipe.sections import Recipe
from flame.recipe.words import overriding

DEFAULTS: dict[str, dict[str, Any]] = {
    "model": {"name": "causal_lm", "flavor": "config", "hf_assets_path": "."},
    "checkpoint": {"enable": True, "last_save_model_only": False},
}
"""Keys of torchtitan with another default here, which must not be changed either."""

INSTEAD = {
    "training.dataset": "name the text in data.dataset",
    "training.dataset_path": "name the text in data.dataset",
    "training.dtype": "weights stay in float32, bf16 compute is training.mixed_precision_param",
    "validation.dataset": "name the text in data.heldout",
    "validation.dataset_path": "name the text in data.heldout",
    "validation.seq_len": "it is training.seq_len",
    "validation.local_batch_size": "sequences are taken one by one",
    "checkpoint.enable": "a run without its last step is lost",
    "checkpoint.folder": "other commands look for the steps in checkpoint/",
    "checkpoint.initial_load_path": "give it as --init",
    "checkpoint.last_save_model_only": "the last step is saved in full, see `slimstate convert`",
    "checkpoint.last_save_in_hf": "run `slimstate convert` after training",
    "memory_estimation.enable": "run `slimstate train --estimate`",
    "parallelism.tensor_parallel_degree": "only data parallelism (FSDP2, HSDP) is supported",
    "parallelism.pipeline_parallel_degree": "only data parallelism (FSDP2, HSDP) is supported",
    "parallelism.context_parallel_degree": "only data parallelism (FSDP2, HSDP) is supported",
    "job.custom_config_module": "no module that a recipe names is ever imported",
    "experimental.custom_import": "no module that a recipe names is ever imported",
    "experimental.custom_args_module": "no module that a recipe names is ever imported",
}


def _combined(name: str, ours: type, theirs: type) -> Any:
    """Return a dataclass with the keys of both; ours win, and `DEFAULTS` win over torchtitan's."""
    fixed = DEFAULTS.get(name, {})
    annotations = {key: type(value) for key, value in fixed.items()}
    body = {**fixed, "__annotations__": annotations, "__module__": __name__}
    return dataclasses.dataclass(type(ours.__name__, (ours, theirs), body))


def _job_class() -> Any:
    theirs: Any = {each.name: each.type for each in dataclasses.fields(titan.JobConfig)}
    classes = {
        name: _combined(name, ours, theirs[name]) if name in theirs else ours
        for name, ours in sections().items()
    }
    fields: list[Any] = [
        (name, of, dataclasses.field(default_factory=of)) for name, of in classes.items()
    ]
    return dataclasses.make_dataclass("JobConfig", fields, bases=(titan.JobConfig,))


JobConfig: Any = _job_class()
"""torchtitan's job configuration with this project's sections."""


def parse_job(arguments: list[str]) -> Any:
    """Return the job of a command line `--job.config_file RECIPE --section.key value …`.

    A recipe in a run folder (beside its `checkpoint/`) dumps into that folder, wherever it lies.

    Raises:
        UserError: the recipe or an override is wrong.
    """
    recipe, overrides = recipe_path(arguments), overriding(arguments)
    job = job_from_tables(read_tables(recipe), overrides)
    if recipe is not None and recipe.name == RECIPE_FILE and _is_run_folder(recipe.parent):
        if "dump_folder" not in overrides.get("job", {}):
            job.job.dump_folder = str(recipe.parent)
    return job


def job_from_tables(*several: Mapping[str, Any]) -> Any:
    """Return the job of a recipe's tables, and of tables that override them, as a `JobConfig`.

    Raises:
        UserError: a section or key is unknown or has no effect here, or a value is wrong.
    """
    recipe, job = Recipe(), JobConfig()
    for tables in several:
        for name, value in fill(recipe, tables).items():
            _check_foreign(job, name, value)
    for name, of in sections().items():
        for key in keys_of(of):
            setattr(getattr(job, name), key, getattr(getattr(recipe, name), key))
    return job


def writing_nothing(job: Any) -> Any:
    """Return a copy of `job` without torchtitan's own checkpointer, events and validation."""
    checkpoint = dataclasses.replace(job.checkpoint, enable=False)
    metrics = dataclasses.replace(job.metrics, enable_tensorboard=False, enable_wandb=False)
    validation = dataclasses.replace(job.validation, enable=False)
    return dataclasses.replace(job, checkpoint=checkpoint, metrics=metrics, validation=validation)


def _check_foreign(job: Any, name: str, value: Any) -> None:
    """Raise UserError unless key `name` is torchtitan's and `value` its default in `job`."""
    default: Any = job
    for part in name.split("."):
        if not dataclasses.is_dataclass(default) or part not in vars(default):
            raise unknown_key(name)
        default = getattr(default, part)
    if dataclasses.is_dataclass(default):
        if not isinstance(value, dict):
            raise UserError(f"recipe key {name} is not a section: write [{name}]")
        for key, inner in value.items():
            _check_foreign(job, f"{name}.{key}", inner)
    # A value of the command line is text.
    elif value != default and str(value).lower() != str(default).lower():
        instead = INSTEAD.get(name, "leave it out")
        raise UserError(f"{name} is {value!r}, and nothing here reads it: {instead}")


def _is_run_folder(folder: Path) -> bool:
    return (folder / CONFIG_FILE).is_file() and (folder / CHECKPOINT_FOLDER).is_dir()
