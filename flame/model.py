"""Causal language models of transformers and fla, built on the meta device and sharded by FSDP2.

The Hugging Face model itself is trained, calibrated and evaluated, so parameters have the names of
its published checkpoints.
"""

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from flame.errors import UserError, first_line
from flame.lora.names import MAGNITUDE
from flame.models.packed_hybrids import is_hybrid, take_packed_documents
from flame.process.distributed import rank

REFUSALS = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, RuntimeError,
    TypeError, ValueError,
)  # fmt: skip
"""What the classes of transformers and fla raise for values of a config that they cannot use."""


def stock_config(config: dict[str, Any]) -> Any:
    """Return the configuration object for the contents of a `config.json`.

    Raises:
        UserError: the family is missing or unknown, or its class refuses the config.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING, AutoConfig

    import flame.register  # noqa: F401
    from flame.hugging_face.config_keys import warn_of_unknown_keys

    model_type = config.get("model_type")
    if not model_type:
        raise UserError("the model's config.json has no model_type: is it a language model's?")
    if model_type not in CONFIG_MAPPING:
        raise UserError(
            f"unknown model family {model_type!r}: neither transformers nor fla has it, look at "
            "model_type in config.json"
        )
    try:
        stock = AutoConfig.for_model(**config)
    except (*REFUSALS, StrictDataclassError) as error:
        raise UserError(f"the config of {model_type!r} is refused: {_reason(error)}") from error
    warn_of_unknown_keys(stock, config)
    return stock


def _reason(error: Exception) -> str:
    """Return the message of an error, without the heading that strict configurations put first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def meta_model(config: dict[str, Any]) -> nn.Module:
    """Build the causal language model of `config` in fp32 on the meta device.

    Buffers (rotary frequencies), which no checkpoint holds, are kept on the CPU as
    `model.initial_buffers` for `restore_after_to_empty`. Hybrids take `cu_seqlens` as fla's do.

    Raises:
        UserError: the config is refused, or the model cannot be built on the meta device.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    stock = stock_config(config)
    try:
        with (
            torch.device("cpu"),
            init_empty_weights(include_buffers=False),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            model = AutoModelForCausalLM.from_config(stock, dtype=torch.float32)
    except REFUSALS as error:
        # Some constructors compute with initial values, which the meta device does not have.
        raise UserError(f"cannot build {config['model_type']!r}: {first_line(error)}") from error
    model.initial_buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    decayless = {n for n, p in model.named_parameters() if getattr(p, "_no_weight_decay", False)}
    model.no_weight_decay_names = decayless
    model.to("meta")
    model.tie_weights()
    if is_hybrid(stock):
        take_packed_documents(model)
    _freeze_indexers(model)
    return model


def _freeze_indexers(model: nn.Module) -> None:
    """Freeze what chooses the tokens of indexed attention: no gradient of the loss reaches it.

    An optimizer would keep no state of these parameters, which a resumed run would miss.
    """
    for name, module in model.named_modules():
        if name.endswith(".indexer"):
            module.requires_grad_(False)


@torch.no_grad()
def restore_after_to_empty(model: nn.Module) -> None:
    """Restore what `to_empty` destroys in a `meta_model`: tied parameters and buffers."""
    model.tie_weights()  # type: ignore[operator]
    buffers = dict(model.named_buffers())
    for name, value in model.initial_buffers.items():
        buffers[name].copy_(value)


def layers(model: nn.Module) -> list[nn.Module]:
    """Return the model's blocks in order: the modules of its `_no_split_modules` classes."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [
        module for module in model.modules() if type(module).__name__.removeprefix("FSDP") in names
    ]


def full_precision_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that always compute in fp32: `A_log`, `dt_bias`, DoRA's magnitudes.

    FSDP2 casts whole groups, so they stay outside it: replicated, never cast, their gradients
    summed by `flame.training.step.gradients`.
    """
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if name.rpartition(".")[2] in ("A_log", "dt_bias") or f".{MAGNITUDE}." in name
    }


def shard(
    model: nn.Module,
    mesh: DeviceMesh,
    param_dtype: torch.dtype = torch.float32,
    reshard_after_forward: bool = True,
) -> nn.Module:
    """Wrap `model` by FSDP2, with a group for each block and one for the rest; return it.

    Gradients are summed over the ranks, not averaged, as the loss is divided by the global tokens.

    Args:
        mesh: one dimension (FSDP) or two (replicas × shards, HSDP), of any size, 1 included.
        param_dtype: compute dtype; parameters, gradients and reductions stay fp32.
    """
    replicated = set(full_precision_parameters(model).values())
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32),
        "ignored_params": replicated,
    }
    for layer in layers(model):
        fully_shard(layer, **options, reshard_after_forward=reshard_after_forward)
    fully_shard(model, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return model


@torch.no_grad()
def initialise(model: nn.Module, config: dict[str, Any], seed: int) -> None:
    """Fill a sharded `model` with its class's random initialisation. Collective.

    Rank 0 builds the model on its CPU and broadcasts one tensor at a time, so the values depend on
    `seed`, and not on the world size or the sharding.
    """
    tensors = dict(_stock_initialisation(config, seed)) if rank() == 0 else {}
    for name, target in named_tensors(model):
        full = torch.empty(target.shape, dtype=target.dtype)
        if rank() == 0:
            full.copy_(tensors.pop(name))
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.broadcast(full, src=0)
        copy_full(target, full)


def _stock_initialisation(config: dict[str, Any], seed: int) -> Iterator[tuple[str, Tensor]]:
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(stock_config(config), dtype=torch.float32)
    yield from named_tensors(model)


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the names and tensors of parameters and buffers, saved or not, each tensor once."""
    yield from model.named_parameters()
    yield from model.named_buffers()


@torch.no_grad()
def copy_full(target: Tensor, full: Tensor) -> None:
    """Copy `full`, the same on every rank, into `target`, a plain tensor or a DTensor."""
    full = full.to(target.device, target.dtype)
    if isinstance(target, DTensor):
        source = distribute_tensor(full, target.device_mesh, target.placements, src_data_rank=None)
        target.to_local().copy_(source.to_local())
    else:
        target.copy_(full)


def count_parameters(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)
