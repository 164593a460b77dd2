"""The tensors of a model with adapters, as a source: they are merged with the base when read."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flame.checkpoint.source import TensorInfo, TensorSource
from flame.errors import UserError
from flame.lora.config import FILE, AdapterConfig
from flame.lora.merging import merge_module
from flame.lora.names import split_peft_name
from flame.lora.ties import Ties


class LoraSource:
    """A LoRA run or peft folder as one model: adapters merged, and what was trained in full.

    peft's own code merges each module, so DoRA (arXiv 2402.09353), PiSSA (2404.02948), OLoRA
    (2406.01775) and others are what peft computes. Floating-point tensors get the wider dtype of
    base and adapters; sums are in float32 or wider. Of a tied model the input embedding alone is
    listed.

    Args:
        base: the model that the adapters were trained on.
        adapters: the adapters' tensors, under peft's names.
        config: peft's `adapter_config.json`.
        model_config: the base's `config.json`, which says whether embeddings are tied.

    Raises:
        UserError: adapters and base do not fit, or the adapters cannot be merged.
    """

    def __init__(
        self,
        base: TensorSource,
        adapters: TensorSource,
        config: Mapping[str, Any],
        model_config: Mapping[str, Any] | None = None,
    ) -> None:
        self._base, self._adapters, self._config = base, adapters, AdapterConfig(config)
        self._parts: dict[str, dict[str, str]] = {}
        self._full: dict[str, str] = {}
        self._names = set(base.names())
        self._ties = Ties(model_config or {}, self._names)
        self._names -= self._ties.repeated
        for name in adapters.names():
            self._sort_in(name)
        self._ties.check(self._parts, self._full, adapters.read, config.get("modules_to_save"))
        for module in self._parts:
            self._check_module(module)
        dtypes = [adapters.info(name).dtype for name in adapters.names()]
        self._dtype = dtypes[0] if dtypes else None
        self._whole: tuple[str, dict[str, Tensor]] = ("", {})

    def names(self) -> list[str]:
        return sorted(self._names)

    def info(self, name: str) -> TensorInfo:
        base = self._base.info(name)
        if self._dtype is None or not base.dtype.is_floating_point:
            return base
        return TensorInfo(base.shape, torch.promote_types(base.dtype, self._dtype))

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        dtype, (module, _, parameter) = self.info(name).dtype, name.rpartition(".")
        if module not in self._parts:
            return self._unmerged(name, rows).to(dtype)
        if self._merges_by_rows(module):
            return self._merged(module, rows)[parameter].to(dtype)
        if self._whole[0] != module:
            self._whole = (module, self._merged(module, None))
        value = self._whole[1][parameter]
        return (value.clone() if rows is None else value[rows].clone()).to(dtype)

    def _unmerged(self, name: str, rows: slice | None) -> Tensor:
        """Return a tensor of the base, or the one that was trained in its place."""
        if name in self._full:
            return self._adapters.read(self._full[name], rows)
        return self._base.read(name, rows)

    def _merges_by_rows(self, module: str) -> bool:
        return self._config.row_by_row and "lora_A.weight" in self._parts[module]

    def _merged(self, module: str, rows: slice | None) -> dict[str, Tensor]:
        parameters = [f"{module}.weight", f"{module}.bias"]
        values = {n: self._unmerged(n, rows) for n in parameters if n in self._names}
        compute = torch.promote_types(values[parameters[0]].dtype, torch.float32)
        entries = {
            part: self._adapters.read(stored, None if part == "lora_A.weight" else rows)
            for part, stored in self._parts[module].items()
        }
        return merge_module(
            self._config,
            module,
            {name.rpartition(".")[2]: value.to(compute) for name, value in values.items()},
            {part: entry.to(compute) if entry.is_floating_point() else entry
             for part, entry in entries.items()},
        )  # fmt: skip

    def _sort_in(self, name: str) -> None:
        target, part = split_peft_name(name, self._config.mark)
        parameter = target if part is None else f"{target}.weight"
        known = parameter in self._names
        if not known and parameter not in self._ties.names:
            raise UserError(f"the adapters hold {name}, for which the base model has no parameter")
        if part is not None:
            self._parts.setdefault(target, {})[part] = name
            return
        self._full[target] = name
        if known:
            self._check_shape(name, self._adapters.info(name).shape, self._base.info(target).shape)

    def _check_module(self, module: str) -> None:
        """Check the tensors of a LoRA layer against its base; of other kinds peft checks them."""
        parts, config = self._parts[module], self._config
        if config.content.get("lora_bias") and f"{module}.bias" not in self._names:
            raise UserError(f"{FILE} sets lora_bias, and {module} has no bias: peft merges none")
        if config.kind != "LORA" or not {"lora_A.weight", "lora_B.weight"} & set(parts):
            return
        wanted = {"lora_A.weight", "lora_B.weight"}
        wanted |= {"lora_magnitude_vector"} if config.is_dora else set()
        if not wanted <= set(parts) or (not config.is_dora and "lora_magnitude_vector" in parts):
            asked = "use_dora " if config.is_dora else ""
            raise UserError(
                f"the adapters hold {', '.join(sorted(parts.values()))} without its partner: "
                f"{FILE} asks {asked}for {len(wanted)} tensors a layer"
            )
        if not config.row_by_row:
            return
        base = self._base.info(f"{module}.weight").shape
        down, up = (self._adapters.info(parts[f"lora_{part}.weight"]).shape for part in "AB")
        product = (up[0], down[1]) if len(up) == len(down) == 2 and up[1] == down[0] else ()
        self._check_shape(parts["lora_B.weight"], product, base)
        if down[0] != config.rank(module):
            raise UserError(
                f"adapter {parts['lora_A.weight']} is of rank {down[0]}, {FILE} says "
                f"{config.rank(module)}"
            )
        if config.is_dora:
            stored = parts["lora_magnitude_vector"]
            self._check_shape(stored, self._adapters.info(stored).shape, base[:1])

    @staticmethod
    def _check_shape(name: str, found: tuple[int, ...], base: tuple[int, ...]) -> None:
        if found != base:
            raise UserError(
                f"adapter {name} makes shape {found}, its base model has {base}: another base?"
            )
