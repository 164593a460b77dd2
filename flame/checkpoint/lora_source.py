"""The tensors of a LoRA run, as a source: adapters are merged with their base when read."""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flame.checkpoint.adapter_names import split_peft_name
from flame.checkpoint.source import TensorInfo, TensorSource
from flame.errors import UserError


class LoraSource:
    """A LoRA run as one model: `W + scale · B A`, and the parameters that were trained in full.

    With DoRA (arXiv 2402.09353), each row of the sum is scaled to its trained length `m`.
    Floating-point tensors get the wider dtype of base and adapters; sums are in float32 or wider.

    Args:
        base: the model that the adapters were trained on.
        adapters: tensors of the run's step, under peft's names.
        config: peft's `adapter_config.json`.

    Raises:
        UserError: adapters and base do not fit, or the config asks for what cannot be merged.
    """

    def __init__(
        self, base: TensorSource, adapters: TensorSource, config: Mapping[str, Any]
    ) -> None:
        _check_adapter_config(config)
        self._base, self._adapters, self._config = base, adapters, config
        self._low_rank: dict[str, dict[str, str]] = {}
        self._full: dict[str, str] = {}
        self._names = set(base.names())
        for name in adapters.names():
            self._sort_in(name)
        for target in self._low_rank:
            self._check_low_rank(target)
        dtypes = [adapters.info(name).dtype for name in adapters.names()]
        self._dtype = dtypes[0] if dtypes else None

    def names(self) -> list[str]:
        return sorted(self._names)

    def info(self, name: str) -> TensorInfo:
        base = self._base.info(name)
        if self._dtype is None or not base.dtype.is_floating_point:
            return base
        return TensorInfo(base.shape, torch.promote_types(base.dtype, self._dtype))

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        dtype = self.info(name).dtype
        if name in self._full:
            return self._adapters.read(self._full[name], rows).to(dtype)
        weight = self._base.read(name, rows)
        if name not in self._low_rank:
            return weight.to(dtype)
        return self._merged(weight, name, rows).to(dtype)

    def _merged(self, weight: Tensor, name: str, rows: slice | None) -> Tensor:
        parts = self._low_rank[name]
        compute = torch.promote_types(weight.dtype, torch.float32)
        down = self._adapters.read(parts["A"]).to(compute)
        up = self._adapters.read(parts["B"], rows).to(compute)
        merged = weight.to(compute) + (up @ down) * self._scale(name, down.shape[0])
        if "m" not in parts:
            return merged
        lengths = self._adapters.read(parts["m"], rows).to(compute)
        return merged * (lengths / torch.linalg.vector_norm(merged, dim=1))[:, None]

    def _scale(self, name: str, rank: int) -> float:
        module = name.removesuffix(".weight")
        alpha = self._config["lora_alpha"]
        for pattern, value in (self._config.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                alpha = value
                break
        return alpha / (math.sqrt(rank) if self._config.get("use_rslora") else rank)

    def _sort_in(self, name: str) -> None:
        target, part = split_peft_name(name)
        if target not in self._names:
            raise UserError(f"the adapters hold {name}, for which the base model has no parameter")
        if part is not None:
            self._low_rank.setdefault(target, {})[part] = name
        else:
            self._full[target] = name
            self._check_shape(name, self._adapters.info(name).shape, self._base.info(target).shape)

    def _check_low_rank(self, target: str) -> None:
        parts, base = self._low_rank[target], self._base.info(target).shape
        wanted = {"A", "B", "m"} if self._config.get("use_dora") else {"A", "B"}
        if set(parts) != wanted:
            asked = "use_dora " if "m" in wanted else ""
            raise UserError(
                f"the adapters hold {', '.join(sorted(parts.values()))} without its partner: "
                f"adapter_config.json asks {asked}for {len(wanted)} tensors a layer"
            )
        down, up = (self._adapters.info(parts[part]).shape for part in "AB")
        product = (up[0], down[1]) if up[1:] == down[:1] else ()
        self._check_shape(parts["B"], product, base)
        if "m" in parts:
            self._check_shape(parts["m"], self._adapters.info(parts["m"]).shape, base[:1])

    @staticmethod
    def _check_shape(name: str, found: tuple[int, ...], base: tuple[int, ...]) -> None:
        if found != base:
            raise UserError(
                f"adapter {name} makes shape {found}, its base model has {base}: another base?"
            )


def _check_adapter_config(config: Mapping[str, Any]) -> None:
    if not isinstance(config.get("lora_alpha"), int | float):
        raise UserError("adapter_config.json has no lora_alpha: it is not a LoRA configuration")
    for option in ("fan_in_fan_out", "lora_bias"):
        if config.get(option):
            raise UserError(f"adapter_config.json sets {option}, which cannot be merged here")
