"""Checking a training job before its first worker starts."""

import importlib.util
import re
from operator import attrgetter
from pathlib import Path
from typing import Any

from flame.checkpoint.reference import CONFIG_FILE, RECIPE_FILE
from flame.checkpoint.steps import broken_steps, whole_steps
from flame.errors import UserError
from flame.hugging_face.config_file import vocabulary_size
from flame.process.distributed import device_type
from flame.process.output_checks import check_place
from flame.recipe.keys import check_values
from flame.run_folder.bound import check_bound, check_steps
from flame.run_folder.origin import model_config, steps_done, tokenizer_of
from flame.run_folder.start_model import start_model
from flame.training import validation
from flame.training.schedule import check_schedule

BYTES_PER_PARAMETER = 12
"""An fp32 weight and two fp32 moments in a checkpoint."""

INSIDE = (
    "metrics.save_tb_folder",
    "profiling.save_traces_folder",
    "profiling.save_memory_snapshot_folder",
    "comm.save_traces_folder",
)
"""Keys whose value is a folder inside the run folder."""

LOG_SUFFIXES = (".err", ".log", ".out")


def check_job(job: Any, world_size: int) -> None:
    """Raise UserError for the first thing that would make `job` fail on `world_size` processes.

    Args:
        job: a `flame.config.JobConfig`.
    """
    check_numbers(job)
    check_size(job, world_size)
    _check_folder(job)
    check_steps(job)
    _check_model_and_data(job, world_size)


def check_size(job: Any, world_size: int) -> None:
    """Raise UserError if `world_size` processes cannot share the model and the batch."""
    _check_parallelism(job.parallelism, world_size)
    _check_batch(job, world_size)


def _check_parallelism(parallelism: Any, world_size: int) -> None:
    replicas, shards = (
        parallelism.data_parallel_replicate_degree,
        parallelism.data_parallel_shard_degree,
    )
    if replicas < 1 or world_size % replicas or (shards != -1 and replicas * shards != world_size):
        raise UserError(
            f"{replicas} replicas of {shards} shards do not make {world_size} processes: "
            "data_parallel_replicate_degree times data_parallel_shard_degree must (-1: the rest)"
        )


def check_numbers(job: Any) -> None:
    """Raise UserError for a value of the recipe that is wrong whatever model and data are."""
    check_values(job)
    if job.lora.rank > 0 and not job.model.init:
        raise UserError(
            f"lora.rank is {job.lora.rank}: adapters need a base, give --init MODEL (0 for none)"
        )
    check_schedule(job.lr_scheduler, job.training.steps)
    if job.validation.steps == 0:
        raise UserError("validation.steps is 0: give a number of batches, or -1 for all text")
    every = job.activation_checkpoint.selective_ac_option
    if not re.fullmatch(r"[1-9]\d{0,8}", every):
        raise UserError(
            f"activation_checkpoint.selective_ac_option is {every!r}: it takes a number of layers, "
            'such as "2"'
        )
    _check_tools(job)


def _check_tools(job: Any) -> None:
    """Raise UserError for a wrong cycle of the profiler, folder, or tool that is not here."""
    profiling = job.profiling
    if profiling.profiler_warmup + profiling.profiler_active > profiling.profile_freq:
        raise UserError(
            f"profiling.profile_freq is {profiling.profile_freq}: it must be at least "
            "profiler_warmup + profiler_active"
        )
    for name in ("enable_profiling", "enable_memory_snapshot"):
        if getattr(profiling, name) and device_type() != "cuda":
            raise UserError(f"profiling.{name} is true: it needs a GPU")
    for name in INSIDE:
        folder = attrgetter(name)(job)
        if not folder or Path(folder).is_absolute() or ".." in Path(folder).parts:
            raise UserError(f"{name} is {folder!r}: it must be a folder inside the run folder")
    if job.metrics.enable_wandb and importlib.util.find_spec("wandb") is None:
        raise UserError("metrics.enable_wandb is true: install wandb, or leave it out")


def _check_batch(job: Any, world_size: int) -> None:
    from flame.data.loader_checks import check_order

    batch = job.training.global_batch_size
    if batch < 1:
        raise UserError(
            "training.global_batch_size must be set: the batch must not depend on the processes"
        )
    check_order(job.data.virtual_shards, world_size, batch)


def _check_folder(job: Any) -> None:
    folder = Path(job.job.dump_folder)
    checkpoints = folder / job.checkpoint.folder
    if folder.exists() and not folder.is_dir():
        raise UserError(f"job.dump_folder {folder} is a file: choose a folder")
    # A run that goes on needs its start no more, unless that is the base of adapters.
    needed = job.lora.rank > 0 or steps_done(job) is None
    start = start_model(job) if job.model.init and needed else None
    if start is not None and start.unverified and job.lora.rank > 0:
        raise UserError(
            f"adapters name their base, and {start.weights} needs files that lie elsewhere: "
            "convert it first (slimstate convert --to dcp)"
        )
    init = start.folder if start is not None else None
    for output in (folder, folder / CONFIG_FILE, checkpoints / "step"):
        check_place(output, inside=init)
    if not _may_hold_run(folder, checkpoints):
        raise UserError(
            f"job.dump_folder {folder} exists and is no run: choose another (a model to start from "
            "is given as --init)"
        )
    if broken_steps(checkpoints) and not whole_steps(checkpoints):
        names = ", ".join(broken_steps(checkpoints))
        raise UserError(
            f"cannot resume {folder}: {names} half-written or damaged, and no other step is there; "
            f"remove {checkpoints} to start again"
        )


def _may_hold_run(folder: Path, checkpoints: Path) -> bool:
    """Whether `folder` is a run, or holds nothing but a scheduler's logs and hidden files.

    A job that was killed as it began may have left hidden files.
    """
    if not folder.exists() or checkpoints.is_dir() or (folder / RECIPE_FILE).is_file():
        return True
    seen = [path for path in folder.iterdir() if not path.name.startswith(".")]
    return all(path.is_file() and path.suffix in LOG_SUFFIXES for path in seen)


def _check_model_and_data(job: Any, world_size: int) -> None:
    from flame.checkpoint.convert import check_space
    from flame.data.loader_checks import check_enough
    from flame.data.sources import build_documents
    from flame.data.tokenizer import check_vocabulary
    from flame.hugging_face.config_file import keeps_documents_apart
    from flame.model import count_parameters, meta_model
    from flame.models.gpu_limits import check_backward, check_dtype
    from flame.recovery.recovery_checks import check_recovery

    config = model_config(job)
    check_dtype(config, job.training.mixed_precision_param, "training.mixed_precision_param")
    check_backward(config)
    tokenizer = tokenizer_of(job)
    check_vocabulary(tokenizer, vocabulary_size(config))
    if job.data.varlen and not keeps_documents_apart(config):
        raise UserError(
            f"data.varlen is set, and transformers' {config['model_type']!r} does not keep packed "
            "documents apart here: set it to false, a row is one text then"
        )
    model = meta_model(config)
    check_recovery(job, model, config)
    checkpoints = Path(job.job.dump_folder).absolute() / job.checkpoint.folder
    check_space(checkpoints, BYTES_PER_PARAMETER * count_parameters(model.parameters()))
    documents = build_documents(job.data, job.data.split)
    check_bound(job, documents)
    if job.validation.enable:
        validation.rows(job, tokenizer)
    check_enough(
        documents, tokenizer, job.data, job.training.seq_len, job.training.global_batch_size
    )
