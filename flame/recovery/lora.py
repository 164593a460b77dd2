"""Low-rank adapters through peft, on a model that is still on the meta device.

Adapters go on before `fully_shard`, so FSDP2 shards and reduces them like any parameter. A LoRA
run's checkpoints hold the trained tensors under peft's names; `base.json` names the base.
"""

import hashlib
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from flame.checkpoint.reference import ADAPTER_FILE, BASE_FILE
from flame.checkpoint.source import TensorSource
from flame.errors import UserError, first_line
from flame.lora.names import ADAPTER, base_name, is_adapter, peft_name
from flame.model import copy_full, named_tensors
from flame.recovery.adapter_scaling import exact_patterns, scaling
from flame.recovery.dora import initialise_magnitudes, use_own_layers
from flame.recovery.trainable import suggestion
from flame.storage.json_file import write_object

HYBRID_TARGETS = (
    "in_proj_qkv", "in_proj_qkvz", "in_proj_z", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj"
)  # fmt: skip
"""What users of transformers' hybrids train in the linear layers, as far as a family has it."""


def inject(model: nn.Module, lora: Any) -> None:
    """Add adapters to `model` in place; freeze all but these, `lora.train_also` and `lora.bias`.

    Args:
        lora: recipe section `[lora]` (`flame.config.Lora`).

    Raises:
        UserError: a target is no linear module, or peft refuses the section.
    """
    from peft import inject_adapter_in_model

    check_targets(model, lora.target_modules)
    frozen = {id(parameter) for parameter in model.parameters() if not parameter.requires_grad}
    try:
        config = peft_config(lora)
        for name, pattern in exact_patterns(lora, _targets(model, lora.target_modules)).items():
            setattr(config, name, pattern)
        inject_adapter_in_model(config, model, adapter_name=ADAPTER, low_cpu_mem_usage=True)
    except ValueError as error:
        raise UserError(f"peft refuses the [lora] section: {first_line(error)}") from error
    use_own_layers(model, ADAPTER)
    call_targets(model)
    trained = {
        id(parameter)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if _is_trained(name, lora)
    } - frozen
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)


def call_targets(model: nn.Module) -> None:
    """Make fla's gated MLPs call an adapted `down_proj`; their fused kernel reads its weight alone.

    The fused kernel and the call compute the same.
    """
    for module in model.modules():
        if getattr(module, "fuse_swiglu", False) and hasattr(module.down_proj, "base_layer"):
            module.fuse_swiglu = False


def peft_config(lora: Any, base: str | None = None) -> Any:
    """Return peft's `LoraConfig` for recipe section `[lora]`; `base` names the base model in it.

    Adapters that training starts from (`lora.init`) keep their own ranks and scales.
    """
    from peft import LoraConfig

    return LoraConfig(
        base_model_name_or_path=base,
        task_type="CAUSAL_LM",
        **scaling(lora),
        lora_dropout=lora.dropout,
        use_dora=lora.dora,
        bias=lora.bias,
        target_modules=list(lora.target_modules),
    )


def initialise_adapters(model: nn.Module, seed: int) -> None:
    """Fill the adapters so that the model, its weights loaded, computes as without them.

    A is uniform like `nn.Linear`'s default (Kaiming, a = √5), B is zero, DoRA's magnitudes are the
    row norms. The values depend on `seed`, the parameter's name and the base, but not on the world
    size. Collective.
    """
    for name, parameter in named_tensors(model):
        if ".lora_A." in name:
            copy_full(parameter, _uniform(name, parameter.shape, seed))
        elif ".lora_B." in name:
            copy_full(parameter, torch.zeros(parameter.shape))
    initialise_magnitudes(model, ADAPTER)


def check_adapters(model: nn.Module, source: TensorSource) -> None:
    """Raise `UserError` unless adapters have the names and shapes of `model`'s, which may be meta.

    Args:
        model: with adapters, as `inject` makes it.
        source: a peft folder or a step.
    """
    _matched(model, source)


def load_adapters(model: nn.Module, source: TensorSource) -> None:
    """Copy adapters, and what was trained beside them, from a peft folder or a step.

    Raises:
        UserError: a tensor is missing on one side, or two shapes differ.
    """
    for name, target in _matched(model, source).items():
        copy_full(target, source.read(name))


def _matched(model: nn.Module, source: TensorSource) -> dict[str, nn.Parameter]:
    """Return the trained parameters that `source` has values for, by their names in it."""
    stored = set(source.names())
    targets = {peft_name(n): p for n, p in model.named_parameters() if p.requires_grad}
    for name in sorted(stored | {name for name in targets if is_adapter(name)}):
        if name not in stored or name not in targets:
            where = "the model to be trained" if name in stored else "lora.init"
            raise UserError(f"{where} has no {name}: give lora.init the [lora] that it was made by")
        found, wanted = source.info(name).shape, tuple(targets[name].shape)
        if found != wanted:
            raise UserError(f"lora.init's {name} has shape {found}, [lora] asks for {wanted}")
    return {name: target for name, target in targets.items() if name in stored}


def trained_tensors(model: nn.Module) -> dict[str, Any]:
    """Return the trained tensors of `model` under peft's names, as a LoRA run saves them."""
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    tensors = get_model_state_dict(model)
    return {peft_name(name): value for name, value in tensors.items() if name in trained}


def write_adapter_files(
    folder: Path, lora: Any, reference: str, fingerprint: str, config: dict[str, Any]
) -> None:
    """Write peft's `adapter_config.json`, and `base.json` that says which model the base is.

    Args:
        folder: an existing folder.
        lora: recipe section `[lora]`.
        reference, fingerprint, config: the base's model reference, fingerprint and `config.json`.
    """
    write_object(folder / ADAPTER_FILE, peft_config(lora, reference).to_dict(), default=_plain)
    base = {"reference": reference, "fingerprint": fingerprint, "config": config}
    write_object(folder / BASE_FILE, base)


def _targets(model: nn.Module, targets: list[str]) -> list[str]:
    return [name for name, _ in model.named_modules() if name.rpartition(".")[2] in targets]


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)


def check_targets(model: nn.Module, targets: list[str]) -> None:
    """Raise UserError for a target that is no linear module, or is the output projection."""
    named = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    head = model.get_output_embeddings()  # type: ignore[operator]
    output = {name.rpartition(".")[2] for name, module in named.items() if module is head}
    linear = {name.rpartition(".")[2] for name in named} - output
    for target in targets:
        if target in output:
            raise UserError(
                f"lora.target_modules names {target!r}, the output projection, which the loss uses "
                f"by itself: train it in full with lora.train_also"
            )
        if target not in linear:
            raise UserError(
                f"lora.target_modules names {target!r}, which is no linear module of the model: "
                f"{suggestion(target, linear)}"
            )
    _check_linear_layers(named, targets)


def _check_linear_layers(named: Iterable[str], targets: list[str]) -> None:
    """Raise UserError if no target is in a hybrid's linear layers, but some in its softmax ones."""
    of_mixers = {name.rpartition(".")[2] for name in named if ".linear_attn." in name}
    if of_mixers and not of_mixers & set(targets):
        raise UserError(
            f"lora.target_modules {targets} are in no linear-attention layer of this hybrid, which "
            f"is what pruning changes: choose among {', '.join(sorted(of_mixers))}, such as "
            f"{','.join(name for name in HYBRID_TARGETS if name in of_mixers)}"
        )


def _is_trained(name: str, lora: Any) -> bool:
    return (
        is_adapter(name)
        or any(part in base_name(name) for part in lora.train_also)
        or (lora.bias == "all" and name.endswith(".bias"))
        or (lora.bias == "lora_only" and name.endswith(".base_layer.bias"))
    )


def _uniform(name: str, shape: torch.Size, seed: int) -> Tensor:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
