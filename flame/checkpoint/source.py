"""Tensors by name, read one at a time, whatever holds them: DCP, safetensors, adapters on a base.

Every source reads row slices too (slices of dimension 0), so that a rank can read just its shard.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem

from flame.checkpoint.safe import SafeReader, load_bytes
from flame.errors import UserError, first_line

TRAINING_PREFIXES = ("optimizer.", "lr_scheduler.", "train_state.", "dataloader.")
"""Beginnings of the names in a step that are not the model's."""

SAFETENSORS_INDEX = "model.safetensors.index.json"
SAFETENSORS_FILE = "model.safetensors"
_PEFT_PREFIX = "base_model.model."
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class TensorSource(Protocol):
    """Named tensors on a disk."""

    def names(self) -> list[str]:
        """The names, sorted."""

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype of a tensor, without reading it; unknown names raise `UserError`."""

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor, or rows `start:stop` of it, as a new CPU tensor of the stored dtype."""


class DcpSource:
    """The tensors of a step folder: the model's, or with `everything` the training state's too.

    A tensor may lie in chunks over many files: only the chunks that overlap the rows asked for are
    read, one at a time. A file is hashed whole when something in it is read for the first time.
    """

    def __init__(self, step: Path, everything: bool = False) -> None:
        self._reader = SafeReader(step)
        self._step = step
        entries = self._reader.read_metadata().state_dict_metadata
        wanted = {n: e for n, e in entries.items() if everything or is_model_name(n)}
        self._tensors = {n: e for n, e in wanted.items() if isinstance(e, TensorStorageMetadata)}
        self._values = {n for n, e in wanted.items() if isinstance(e, BytesStorageMetadata)}

    def names(self) -> list[str]:
        return sorted(self._tensors)

    def info(self, name: str) -> TensorInfo:
        entry = self._entry(name)
        return TensorInfo(tuple(entry.size), entry.properties.dtype)

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        info = self.info(name)
        start, stop = _bounds(name, info, rows)
        shape = (stop - start, *info.shape[1:]) if info.shape else ()
        target = torch.empty(shape, dtype=info.dtype)
        items = [
            item
            for chunk in self._entry(name).chunks
            if (item := _overlap(name, chunk, start, stop)) is not None
        ]
        if sum(math.prod(item.lengths) for item in items) != target.numel():
            raise UserError(f"{self._step} does not hold all of {name}: use another step")
        for item in items:
            self._reader.read_data(LoadPlan([item]), _Into(target))
        return target

    def values(self) -> dict[str, Any]:
        """The entries that are not tensors (numbers, strings, lists), by their flat names."""
        return {name: self._value(name) for name in sorted(self._values)}

    def _value(self, name: str) -> Any:
        index, zero = MetadataIndex(name), torch.Size((0,))
        item = ReadItem(LoadItemType.BYTE_IO, index, zero, index, zero, zero)
        planner = _Collect()
        self._reader.read_data(LoadPlan([item]), planner)
        return planner.loaded[name]

    def _entry(self, name: str) -> TensorStorageMetadata:
        if name not in self._tensors:
            raise UserError(f"{self._step} has no tensor {name}")
        return self._tensors[name]


class SafetensorsSource:
    """The tensors of a Hugging Face folder: one `model.safetensors`, or several with an index."""

    def __init__(self, folder: Path) -> None:
        self._files = _weight_files(Path(folder))
        self._folder = Path(folder)
        self._open: dict[Path, Any] = {}

    def names(self) -> list[str]:
        return sorted(self._files)

    def info(self, name: str) -> TensorInfo:
        view = self._view(name)
        code = view.get_dtype()
        if code not in _DTYPES:
            raise UserError(f"{name} in {self._files[name]} is of dtype {code}: not supported")
        return TensorInfo(tuple(view.get_shape()), _DTYPES[code])

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        info, path = self.info(name), self._files[name]
        start, stop = _bounds(name, info, rows)
        try:
            if rows is None or not info.shape:
                return self._handle(path).get_tensor(name)
            return self._view(name)[start:stop]
        except (SafetensorError, OSError) as error:
            raise UserError(f"cannot read {name} of {path}: {first_line(error)}") from error

    def _view(self, name: str) -> Any:
        if name not in self._files:
            raise UserError(f"{self._folder} has no tensor {name}")
        path = self._files[name]
        try:
            return self._handle(path).get_slice(name)
        except SafetensorError as error:
            raise UserError(f"{path} lacks {name}, which its index promises") from error

    def _handle(self, path: Path) -> Any:
        if path not in self._open:
            self._open[path] = open_safetensors(path)
        return self._open[path]


class LoraSource:
    """The merged view of a LoRA run: `W + scale · B A`, and parameters that were trained in full.

    Args:
        base: the model that the adapters were trained on.
        adapters: tensors of the run's step, in peft's names.
        config: peft's `adapter_config.json`.

    Floating-point tensors have the wider dtype of base and adapters; sums are in float32 or wider.
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
        return weight.to(compute) + (up @ down) * self._scale(name, down.shape[0])

    def _scale(self, name: str, rank: int) -> float:
        module = name.removesuffix(".weight")
        alpha = self._config["lora_alpha"]
        for pattern, value in (self._config.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                alpha = value
                break
        return alpha / (math.sqrt(rank) if self._config.get("use_rslora") else rank)

    def _sort_in(self, name: str) -> None:
        match = re.fullmatch(
            rf"{re.escape(_PEFT_PREFIX)}(.+)\.lora_([AB])(?:\.[^.]+)?\.weight", name
        )
        target = f"{match[1]}.weight" if match else _plain_name(name)
        if target not in self._names:
            raise UserError(f"the adapters hold {name}, for which the base model has no parameter")
        if match:
            self._low_rank.setdefault(target, {})[match[2]] = name
        else:
            self._full[target] = name
            self._check_shape(name, self._adapters.info(name).shape, self._base.info(target).shape)

    def _check_low_rank(self, target: str) -> None:
        parts = self._low_rank[target]
        if len(parts) < 2:
            raise UserError(f"the adapters hold {', '.join(parts.values())} without its partner")
        down, up = (self._adapters.info(parts[part]).shape for part in "AB")
        product = (up[0], down[1]) if up[1:] == down[:1] else ()
        self._check_shape(parts["B"], product, self._base.info(target).shape)

    @staticmethod
    def _check_shape(name: str, found: tuple[int, ...], base: tuple[int, ...]) -> None:
        if found != base:
            raise UserError(
                f"adapter {name} makes shape {found}, its base model has {base}: another base?"
            )


def is_model_name(name: str) -> bool:
    """Whether a name of a step is the model's own, not the optimizer's or a schedule's."""
    return not name.startswith(TRAINING_PREFIXES)


def total_bytes(source: TensorSource) -> int:
    """Bytes that all tensors of `source` take."""
    return sum(source.info(name).nbytes for name in source.names())


def open_safetensors(path: Path) -> Any:
    """An open handle of a safetensors file; `UserError` if it is missing or damaged."""
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise UserError(f"{path} is missing: copy the model again") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged ({first_line(error)}): copy the model again") from error


class _Into(DefaultLoadPlanner):
    """Puts what is read into one tensor."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        view = self._target
        for dim, (start, length) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            view = view.narrow(dim, start, length)
        return view


class _Collect(DefaultLoadPlanner):
    """Keeps the plain values that are read."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: dict[str, Any] = {}

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        name = read_item.dest_index.fqn
        self.loaded[name] = load_bytes(name, value)


def _overlap(name: str, chunk: ChunkStorageMetadata, start: int, stop: int) -> ReadItem | None:
    """What to read of a chunk for rows `start:stop` of its tensor, None if nothing."""
    offsets, sizes = list(chunk.offsets), list(chunk.sizes)
    within = [0] * len(sizes)
    place = list(offsets)
    if sizes:
        first, last = max(offsets[0], start), min(offsets[0] + sizes[0], stop)
        within[0], place[0], sizes[0] = first - offsets[0], first - start, last - first
    if any(size <= 0 for size in sizes):
        return None
    return ReadItem(
        type=LoadItemType.TENSOR,
        dest_index=MetadataIndex(name),
        dest_offsets=torch.Size(place),
        storage_index=MetadataIndex(name, chunk.offsets),
        storage_offsets=torch.Size(within),
        lengths=torch.Size(sizes),
    )


def _bounds(name: str, info: TensorInfo, rows: slice | None) -> tuple[int, int]:
    if not info.shape:
        if rows is not None:
            raise ValueError(f"{name} is a scalar: it has no rows")
        return 0, 0
    start, stop, step = (rows or slice(None)).indices(info.shape[0])
    if step != 1:
        raise ValueError(f"rows of {name} must be contiguous, got a step of {step}")
    return start, max(start, stop)


def _weight_files(folder: Path) -> dict[str, Path]:
    """The file that holds each tensor of a Hugging Face folder."""
    index = folder / SAFETENSORS_INDEX
    if index.is_file():
        return _indexed_files(index)
    single = folder / SAFETENSORS_FILE
    if single.is_file():
        return dict.fromkeys(open_safetensors(single).keys(), single)
    if any(folder.glob("pytorch_model*.bin")):
        raise UserError(
            f"{folder} holds weights as pickles (pytorch_model.bin), which can run code: "
            "save it as safetensors first"
        )
    raise UserError(f"{folder} has no {SAFETENSORS_FILE}: it is not a Hugging Face model folder")


def _indexed_files(index: Path) -> dict[str, Path]:
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        files = {str(name): index.parent / Path(file).name for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is not a safetensors index: copy the model again") from error
    for path in sorted(set(files.values())):
        if not path.is_file():
            raise UserError(f"{index} names {path.name}, which is missing: copy the model again")
    return files


def _plain_name(name: str) -> str:
    return name.removeprefix(_PEFT_PREFIX).replace(".base_layer.", ".")


def _check_adapter_config(config: Mapping[str, Any]) -> None:
    if not isinstance(config.get("lora_alpha"), int | float):
        raise UserError("adapter_config.json has no lora_alpha: it is not a LoRA configuration")
    for option in ("use_dora", "fan_in_fan_out", "lora_bias"):
        if config.get(option):
            raise UserError(f"adapter_config.json sets {option}, which cannot be merged here")
