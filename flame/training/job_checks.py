"""Checking a training job before its first worker starts."""

import math
from operator import attrgetter
from pathlib import Path
from typing import Any

from flame.checkpoint.reference import CONFIG_FILE, RECIPE_FILE, resolve, vocabulary_size
from flame.checkpoint.steps import broken_steps, whole_steps
from flame.errors import UserError
from flame.process.atomic_output import check_output

BYTES_PER_PARAMETER = 12
"""An fp32 weight and two fp32 moments in a checkpoint."""

ASYNC_MODES = ("disabled", "async")

IGNORED = (
    "training.dataset",
    "training.dataset_path",
    "training.enable_cpu_offload",
    "training.mixed_precision_reduce",
    "checkpoint.initial_load_path",
    "checkpoint.initial_load_in_hf",
    "checkpoint.exclude_from_loading",
    "checkpoint.create_seed_checkpoint",
    "checkpoint.load_only",
    "checkpoint.export_dtype",
    "activation_checkpoint.memory_budget",
    "activation_checkpoint.early_stop",
    "activation_checkpoint.preserve_rng_state",
    "fault_tolerance.enable",
    "memory_estimation.enable",
    "model.converters",
    "comm.mode",
    "job.custom_config_module",
    "experimental.custom_import",
    "experimental.custom_args_module",
)
"""torchtitan's options that this trainer ignores; changing one is an error."""

INSTEAD = {
    "training.dataset": "name the text in data.dataset",
    "training.dataset_path": "name the text in data.dataset",
    "checkpoint.initial_load_path": "give it as --init",
    "memory_estimation.enable": "run `slimstate train --estimate`",
}

LOG_SUFFIXES = (".err", ".log", ".out")

UNSUPPORTED_DEGREES = (
    "tensor_parallel_degree",
    "pipeline_parallel_degree",
    "context_parallel_degree",
    "expert_parallel_degree",
    "expert_tensor_parallel_degree",
)


def check_job(job: Any, world_size: int) -> None:
    """Raise UserError for the first thing that would make `job` fail on `world_size` processes.

    Args:
        job: a `flame.config.JobConfig`.
    """
    check_size(job, world_size)
    check_numbers(job)
    check_ignored(job)
    check_checkpoint(job)
    _check_folder(job)
    _check_model_and_data(job, world_size)


def check_size(job: Any, world_size: int) -> None:
    """Raise UserError if `world_size` processes cannot share the model and the batch."""
    _check_parallelism(job.parallelism, world_size)
    _check_batch(job, world_size)


def _check_parallelism(parallelism: Any, world_size: int) -> None:
    for name in UNSUPPORTED_DEGREES:
        if getattr(parallelism, name) != 1:
            raise UserError(
                f"parallelism.{name} is {getattr(parallelism, name)}: only data parallelism "
                "(FSDP2, HSDP) is supported, set it to 1"
            )
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
    """Raise UserError for a value of the recipe that is wrong whatever the rest says."""
    from flame.training.schedule import check_schedule

    positive = {
        "training.steps": job.training.steps,
        "training.seq_len": job.training.seq_len,
        "training.local_batch_size": job.training.local_batch_size,
        "training.max_norm": job.training.max_norm,
        "training.max_nonfinite_steps": job.training.max_nonfinite_steps,
        "optimizer.lr": job.optimizer.lr,
        "checkpoint.interval": job.checkpoint.interval,
        "metrics.log_freq": job.metrics.log_freq,
    }
    for name, value in positive.items():
        if not (math.isfinite(value) and value > 0):
            raise UserError(f"{name} is {value}: it must be above 0")
    if job.lora.rank < 0 or (job.lora.rank > 0 and not job.model.init):
        raise UserError(
            f"lora.rank is {job.lora.rank}: adapters need a base, give --init MODEL (0 for none)"
        )
    check_schedule(job.lr_scheduler, job.training.steps)
    if job.validation.enable:
        raise UserError("validation.enable must be false: measure a run by `slimstate eval`")
    if job.training.dtype != "float32":
        raise UserError("training.dtype must be float32: bf16 compute is mixed_precision_param")
    if job.activation_checkpoint.mode not in ("none", "full", "selective"):
        raise UserError(
            f"activation_checkpoint.mode is {job.activation_checkpoint.mode!r}: "
            "choose none, full or selective"
        )
    if not str(job.activation_checkpoint.selective_ac_option).isdigit():
        raise UserError("activation_checkpoint.selective_ac_option must be a number of layers")


def _check_batch(job: Any, world_size: int) -> None:
    from flame.data.loader_checks import check_order

    batch, local = job.training.global_batch_size, job.training.local_batch_size
    if batch < 1:
        raise UserError(
            "training.global_batch_size must be set: the batch must not depend on the processes"
        )
    check_order(job.data.virtual_shards, world_size, batch, local)


def check_ignored(job: Any) -> None:
    default = type(job)()
    for name in IGNORED:
        given = attrgetter(name)(job)
        if given != attrgetter(name)(default):
            instead = INSTEAD.get(name, "leave it out")
            raise UserError(f"{name} is {given!r}, and nothing here reads it: {instead}")


def check_checkpoint(job: Any) -> None:
    if job.checkpoint.async_mode not in ASYNC_MODES:
        raise UserError(
            f"checkpoint.async_mode is {job.checkpoint.async_mode!r}: choose from "
            f"{', '.join(ASYNC_MODES)}"
        )
    if job.checkpoint.last_save_model_only or job.checkpoint.last_save_in_hf:
        raise UserError("the last step is saved in full: convert it with `slimstate convert`")
    if not job.checkpoint.enable:
        raise UserError("checkpoint.enable must be true: a run without its last step is lost")


def _check_folder(job: Any) -> None:
    folder = Path(job.job.dump_folder)
    checkpoints = folder / job.checkpoint.folder
    if folder.exists() and not folder.is_dir():
        raise UserError(f"job.dump_folder {folder} is a file: choose a folder")
    init = resolve(job.model.init).folder if job.model.init else None
    for output in (folder, folder / CONFIG_FILE, checkpoints / "step"):
        check_output(output, overwrite=True, inside=init)
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
    from flame.model import count_parameters, meta_model
    from flame.recovery.recovery_checks import check_recovery
    from flame.training.train_spec import model_config, tokenizer_of

    config = model_config(job)
    tokenizer = tokenizer_of(job)
    check_vocabulary(tokenizer, vocabulary_size(config))
    model = meta_model(config)
    check_recovery(job, model, config)
    checkpoints = Path(job.job.dump_folder).absolute() / job.checkpoint.folder
    check_space(checkpoints, BYTES_PER_PARAMETER * count_parameters(model.parameters()))
    documents = build_documents(job.data, job.data.split)
    check_enough(
        documents, tokenizer, job.data, job.training.seq_len, job.training.global_batch_size
    )
