"""The torchtitan train spec for any causal language model of transformers or fla."""

import flame.process.titan_cpu  # noqa: F401  (must precede torchtitan)

# isort: split
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torchtitan.components.loss import build_cross_entropy_loss
from torchtitan.protocols.model import BaseModelArgs
from torchtitan.protocols.train_spec import TrainSpec, register_train_spec
from torchtitan.tools.logging import logger
from torchtitan.tools.profiling import maybe_enable_memory_snapshot, maybe_enable_profiling

from flame.checkpoint.load import load_weights
from flame.checkpoint.reference import resolve
from flame.data.loader import PackedLoader
from flame.data.sources import build_documents
from flame.model import (
    count_parameters,
    initialise,
    layers,
    meta_model,
    restore_after_to_empty,
    shard,
)
from flame.process.distributed import compute_dtype, device_type
from flame.recovery.lora import initialise_adapters, inject, load_adapters
from flame.recovery.trainable import freeze_others
from flame.run_folder.origin import model_config, steps_done, tokenizer_of
from flame.run_folder.start_model import start_model
from flame.training.optimizer import build_optimizers
from flame.training.schedule import build_schedules

NAME = "causal_lm"


@dataclass
class CausalLMArgs(BaseModelArgs):
    """What builds the model: its `config.json` and the job."""

    config: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # The job is not a field, since torchtitan logs all fields.
        self.job: Any = None

    def update_from_config(self, job_config: Any, **_: Any) -> None:
        self.config = model_config(job_config)
        self.job = job_config

    def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
        """Return the parameters, and the floating-point operations a token: 6 a weight used."""
        embedding = model.get_input_embeddings().weight.numel()
        total = count_parameters(model.parameters())
        tied = bool(getattr(model.config, "tie_word_embeddings", False))
        return total, 6 * (total if tied else total - embedding)


def build_model(args: CausalLMArgs) -> nn.Module:
    """Build the model on the meta device, with adapters; its `init_weights` fills it later."""
    model = meta_model(args.config)
    if args.job.lora.rank > 0:
        inject(model, args.job.lora)
    else:
        freeze_others(model, args.job.trainable.modules)
    # torchtitan calls model.init_weights(buffer_device=…); transformers' method takes no argument.
    model.init_weights = partial(init_weights, model, args)
    return model


def init_weights(model: nn.Module, args: CausalLMArgs, buffer_device: Any = None) -> None:
    """Fill a sharded, materialised model from `model.init`, or randomly by `debug.seed`.

    A run that goes on reads its own step later: then only the base of adapters is filled here.
    """
    job = args.job
    seed = job.debug.seed if job.debug.seed is not None else 0
    restore_after_to_empty(model)
    if job.lora.rank == 0 and steps_done(job) is not None:
        # All of it is read from the step. Drawing it would hold the whole model on rank 0.
        return
    if job.model.init:
        load_weights(model, start_model(job).source())
    else:
        initialise(model, args.config, seed)
    initialise_adapters(model, seed)
    if job.lora.init:
        load_adapters(model, resolve(job.lora.init).own_source())


def parallelize(model: nn.Module, parallel_dims: Any, job: Any) -> nn.Module:
    """Apply activation checkpointing, torch.compile (only on CUDA) and FSDP2 or HSDP, in turn."""
    apply_activation_checkpointing(model, job.activation_checkpoint)
    if job.compile.enable and "model" in job.compile.components:
        compile_layers(model, job.compile.backend)
    policy = job.parallelism.fsdp_reshard_after_forward
    return shard(
        model,
        data_mesh(parallel_dims),
        training_dtype(job),
        reshard_after_forward=policy != "never",
    )


def data_mesh(parallel_dims: Any) -> DeviceMesh:
    """Return the mesh of all ranks: shards (FSDP2), or replicas × shards (HSDP)."""
    sizes = {"dp_replicate": parallel_dims.dp_replicate, "fsdp": parallel_dims.dp_shard}
    if sizes["dp_replicate"] == 1:
        del sizes["dp_replicate"]
    return init_device_mesh(device_type(), tuple(sizes.values()), mesh_dim_names=tuple(sizes))


def training_dtype(job: Any) -> torch.dtype:
    """Return the dtype to compute in: `training.mixed_precision_param`, or float32 on a CPU."""
    return compute_dtype(
        "float32" if device_type() == "cpu" else job.training.mixed_precision_param
    )


def apply_activation_checkpointing(model: nn.Module, config: Any) -> None:
    """Make every layer (mode `full`) or every n-th (`selective`) recompute in the backward pass."""
    if config.mode == "none":
        return
    every = 1 if config.mode == "full" else int(config.selective_ac_option)
    # transformers' own checkpointing, unlike torchtitan's, renames no parameter.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for position, layer in enumerate(layers(model)):
        layer.gradient_checkpointing = position % every == 0


def compile_layers(model: nn.Module, backend: str) -> None:
    if device_type() != "cuda":
        logger.info("compile.enable is ignored on a CPU")
        return
    for layer in layers(model):
        layer.compile(backend=backend)


@contextmanager
def profilers(job: Any, step: int) -> Iterator[list[Any]]:
    """Run torchtitan's profilers in the block; yield those that are on, to be told of each step.

    Args:
        job: sections `[job]` and `[profiling]` say where to and what.
        step: the step that the job goes on from.
    """
    options: dict[str, Any] = {"global_step": step, "base_folder": job.job.dump_folder}
    with (
        maybe_enable_profiling(job.profiling, **options) as durations,
        maybe_enable_memory_snapshot(job.profiling, **options) as memory,
    ):
        yield [profiler for profiler in (durations, memory) if profiler]


def build_loader(dp_world_size: int, dp_rank: int, tokenizer: Any, job_config: Any) -> PackedLoader:
    """Return this rank's loader, which makes the batches of two steps ahead."""
    data, training = job_config.data, job_config.training
    taken = training.global_batch_size // (training.local_batch_size * dp_world_size)
    return PackedLoader(
        build_documents(data, data.split),
        tokenizer,
        data,
        seq_len=training.seq_len,
        local_batch_size=training.local_batch_size,
        rank=dp_rank,
        world_size=dp_world_size,
        ahead=2 * taken,
        pin=device_type() == "cuda",
    )


SPEC = TrainSpec(
    model_cls=build_model,
    model_args={"config": CausalLMArgs()},
    parallelize_fn=parallelize,
    pipelining_fn=None,
    build_optimizers_fn=build_optimizers,
    build_lr_schedulers_fn=build_schedules,
    build_dataloader_fn=build_loader,
    build_tokenizer_fn=tokenizer_of,
    build_loss_fn=build_cross_entropy_loss,
)


def register() -> None:
    """Register the train spec with torchtitan, once."""
    from torchtitan.protocols.train_spec import _extra_train_specs

    if NAME not in _extra_train_specs:
        register_train_spec(NAME, SPEC)
