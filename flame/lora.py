"""Low-rank adapters through peft, on a model that is still on the meta device.

Adapters go on before `fully_shard`, so FSDP2 shards and reduces them like any parameter. A LoRA
run's checkpoints hold what is trained, in peft's names; the base is named beside them.
"""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flame.checkpoint.reference import ADAPTER_FILE, BASE_FILE
from flame.errors import UserError, first_line
from flame.model import copy_full, named_tensors

ADAPTER = "default"
"""peft's name of the one adapter."""

PEFT_PREFIX = "base_model.model."
"""What peft puts before every name in its adapter files."""


def inject(model: nn.Module, lora: Any) -> None:
    """Add adapters to `model` in place, freeze the rest but for `lora.train_also`.

    Args:
        lora: recipe section `[lora]` (`flame.config.Lora`).
    """
    from peft import inject_adapter_in_model

    _check_targets(model, lora.target_modules)
    try:
        inject_adapter_in_model(
            peft_config(lora), model, adapter_name=ADAPTER, low_cpu_mem_usage=True
        )
    except ValueError as error:
        raise UserError(f"peft refuses the [lora] section: {first_line(error)}") from error
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_is_trained(name, lora.train_also))


def peft_config(lora: Any, base: str | None = None) -> Any:
    """peft's `LoraConfig` of recipe section `[lora]`."""
    from peft import LoraConfig

    return LoraConfig(
        base_model_name_or_path=base,
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.target_modules),
    )


def initialise_adapters(model: nn.Module, seed: int) -> None:
    """Fill the adapters: A uniform as `nn.Linear`'s default (Kaiming, a = √5), B zero.

    The values depend on `seed` and the parameter's name alone, not on world size or sharding.
    """
    for name, parameter in named_tensors(model):
        if ".lora_A." in name:
            copy_full(parameter, _uniform(name, parameter.shape, seed))
        elif ".lora_B." in name:
            copy_full(parameter, torch.zeros(parameter.shape))


def is_adapter(name: str) -> bool:
    return ".lora_" in name


def base_name(name: str) -> str:
    """The name that parameter `name` of an adapted model has in the model without adapters."""
    return name.replace(".base_layer.", ".")


def peft_name(name: str) -> str:
    """The name of parameter `name` of an adapted model in peft's adapter files."""
    return PEFT_PREFIX + base_name(name).replace(f".{ADAPTER}.", ".")


def write_adapter_files(
    folder: Path, lora: Any, reference: str, fingerprint: str, config: dict[str, Any]
) -> None:
    """Write peft's `adapter_config.json` and `base.json` (the base's reference and fingerprint)."""
    text = json.dumps(peft_config(lora, reference).to_dict(), indent=2, default=_plain)
    (folder / ADAPTER_FILE).write_text(text + "\n")
    base = {"reference": reference, "fingerprint": fingerprint, "config": config}
    (folder / BASE_FILE).write_text(json.dumps(base, indent=2) + "\n")


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)


def _is_trained(name: str, train_also: list[str]) -> bool:
    return is_adapter(name) or any(part in base_name(name) for part in train_also)


def _check_targets(model: nn.Module, targets: list[str]) -> None:
    linear = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    for target in targets:
        if target not in linear:
            raise UserError(
                f"lora.target_modules names {target!r}, which is no linear module of the model: "
                f"choose from {', '.join(sorted(linear))}"
            )


def _uniform(name: str, shape: torch.Size, seed: int) -> Tensor:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
