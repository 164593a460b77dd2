"""The torchtitan train spec for any causal language model of transformers or fla."""

import flame.process.titan_cpu  # noqa: F401  (must precede torchtitan)

# isort: split
import warnings
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torchtitan.components.loss import build_cross_entropy_loss
from torchtitan.protocols.model import BaseModelArgs
from torchtitan.protocols.train_spec import TrainSpec, register_train_spec
from torchtitan.tools.logging import logger

from flame.checkpoint.load import load_weights
from flame.checkpoint.reference import (
    CONFIG_FILE,
    RECIPE_FILE,
    TOKENIZER_CONFIG,
    read_config,
    resolve,
)
from flame.data.hub import hub_problem
from flame.data.loader import PackedLoader
from flame.data.mqar import is_mqar
from flame.data.mqar_tokens import mqar_tokenizer
from flame.data.sources import build_documents
from flame.data.tokenizer import load_tokenizer
from flame.errors import UserError, first_line
from flame.model import (
    count_parameters,
    initialise,
    layers,
    meta_model,
    restore_after_to_empty,
    shard,
    sum_replicated_gradients,
)
from flame.process.distributed import compute_dtype, device_type, gather_objects
from flame.recovery.lora import initialise_adapters, inject, load_adapters
from flame.recovery.trainable import freeze_others
from flame.training.optimizer import build_optimizers
from flame.training.schedule import build_schedules
from flame.training.start_model import start_model

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


def model_config(job: Any) -> dict[str, Any]:
    """Return the `config.json` to train: the run folder's, `model.init`'s or `model.config`.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    own = Path(job.job.dump_folder) / CONFIG_FILE
    if own.is_file():
        return read_config(own)
    if job.model.init:
        return start_model(job).config
    if not job.model.config:
        raise UserError("no model: give model.config (a config.json) or --init MODEL")
    path = Path(job.model.config)
    if path.is_file():
        return read_config(path)
    if path.is_dir():
        return read_config(path / CONFIG_FILE)
    return hub_config(job.model.config)


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
    """Fill a sharded, materialised model from `model.init`, or randomly by `debug.seed`."""
    job = args.job
    seed = job.debug.seed if job.debug.seed is not None else 0
    restore_after_to_empty(model)
    if job.model.init:
        load_weights(model, start_model(job).source())
    else:
        initialise(model, args.config, seed)
    initialise_adapters(model, seed)
    if job.lora.init:
        load_adapters(model, resolve(job.lora.init).own_source())
    sum_replicated_gradients(model)


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


def build_loader(dp_world_size: int, dp_rank: int, tokenizer: Any, job_config: Any) -> PackedLoader:
    data, training = job_config.data, job_config.training
    return PackedLoader(
        build_documents(data, data.split),
        tokenizer,
        data,
        seq_len=training.seq_len,
        local_batch_size=training.local_batch_size,
        rank=dp_rank,
        world_size=dp_world_size,
        agree=bool if data.repeat else lambda ready: all(gather_objects(ready)),
    )


def tokenizer_of(job: Any) -> Any:
    """Load the first tokenizer of: the run folder's, `data.tokenizer`, `model.init`'s, MQAR's.

    Raises:
        UserError: there is none.
    """
    own = Path(job.job.dump_folder)
    if _has_tokenizer(own):
        return load_tokenizer(str(own))
    if job.data.tokenizer:
        return load_tokenizer(job.data.tokenizer)
    if job.model.init:
        folder = start_model(job).tokenizer
        if folder is not None:
            return load_tokenizer(str(folder))
    if is_mqar(job.data.dataset):
        return mqar_tokenizer(job.data.dataset)
    raise UserError("no tokenizer: give data.tokenizer (a folder or a hub name)")


def _has_tokenizer(run: Path) -> bool:
    """Whether a run folder has a whole tokenizer, and not part of one from a killed start."""
    started, complete = (run / RECIPE_FILE).is_file(), (run / TOKENIZER_CONFIG).is_file()
    return complete or ((run / "tokenizer.json").is_file() and not started)


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
