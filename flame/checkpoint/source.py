"""Tensors by name, read one at a time, from DCP steps and safetensors.

Every source reads row slices too (slices of dimension 0), so that a rank can read just its shard.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem

from flame.errors import UserError
from flame.storage.json_file import read_object
from flame.storage.safe_reader import Check, SafeReader, load_bytes
from flame.storage.safetensors_file import DTYPES, SafetensorsFile, open_safetensors

TRAINING_PREFIXES = ("optimizer.", "lr_scheduler.", "train_state.", "dataloader.")
"""Beginnings of the names in a step that are not the model's."""

SAFETENSORS_INDEX = "model.safetensors.index.json"
SAFETENSORS_FILE = "model.safetensors"


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def promise(self) -> Tensor:
        """A meta-device tensor of this form, for a checkpoint whose content is read later."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


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
    read, one at a time.

    Args:
        step: the folder.
        everything: the training state's tensors too.
        check: when files are compared with their hashes (`flame.storage.safe_reader.SafeReader`).
    """

    def __init__(self, step: Path, everything: bool = False, check: Check = "first") -> None:
        self._reader = SafeReader(step, check)
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
            self._read_chunk(item, target)
        return target

    def stored_order(self) -> list[str]:
        """The names in the order in which the tensors begin in their files: the fastest to read."""
        places = {name: self._reader.offset(self._first(name)) for name in self._tensors}
        return sorted(places, key=lambda name: (places[name], name))

    def finish(self) -> None:
        """Compare every file with its hash, from where it was taken `along` to."""
        self._reader.finish()

    def _read_chunk(self, item: ReadItem, target: Tensor) -> None:
        part = _Into(target).resolve_tensor(item)
        if not part.is_contiguous():
            whole = torch.empty(part.shape, dtype=part.dtype)
            if self._reader.read_rows(item, whole):
                part.copy_(whole)
                return
        elif self._reader.read_rows(item, part):
            return
        self._reader.read_data(LoadPlan([item]), _Into(target))

    def values(self) -> dict[str, Any]:
        """The entries that are not tensors (numbers, strings, lists), by their flat names."""
        return {name: self._value(name) for name in sorted(self._values)}

    def _value(self, name: str) -> Any:
        index, zero = MetadataIndex(name), torch.Size((0,))
        item = ReadItem(LoadItemType.BYTE_IO, index, zero, index, zero, zero)
        planner = _Collect()
        self._reader.read_data(LoadPlan([item]), planner)
        return planner.loaded[name]

    def _first(self, name: str) -> MetadataIndex:
        return MetadataIndex(name, self._tensors[name].chunks[0].offsets)

    def _entry(self, name: str) -> TensorStorageMetadata:
        if name not in self._tensors:
            raise UserError(f"{self._step} has no tensor {name}")
        return self._tensors[name]


class SafetensorsSource:
    """The tensors of a Hugging Face folder: one `model.safetensors`, or several with an index.

    `file` is another name for the one (`adapter_model.safetensors`).
    """

    def __init__(self, folder: Path, file: str = SAFETENSORS_FILE) -> None:
        self._files = _weight_files(Path(folder), file)
        self._folder = Path(folder)
        self._open: dict[Path, SafetensorsFile] = {}

    def names(self) -> list[str]:
        return sorted(self._files)

    def info(self, name: str) -> TensorInfo:
        entry, path = self._file(name).entries[name], self._files[name]
        if entry.code not in DTYPES:
            raise UserError(f"{name} in {path} is of dtype {entry.code}: not supported")
        return TensorInfo(entry.shape, DTYPES[entry.code])

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        start, stop = _bounds(name, self.info(name), rows)
        return self._file(name).read(name, start, stop)

    def _file(self, name: str) -> SafetensorsFile:
        """The file that holds a tensor."""
        if name not in self._files:
            raise UserError(f"{self._folder} has no tensor {name}")
        path = self._files[name]
        if path not in self._open:
            self._open[path] = SafetensorsFile(path)
        if name not in self._open[path].entries:
            raise UserError(f"{path} lacks {name}, which its index promises")
        return self._open[path]


def is_model_name(name: str) -> bool:
    """Whether a name of a step is the model's own, not the optimizer's or a schedule's."""
    return not name.startswith(TRAINING_PREFIXES)


def total_bytes(source: TensorSource) -> int:
    """Bytes that all tensors of `source` take."""
    return sum(source.info(name).nbytes for name in source.names())


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


def _weight_files(folder: Path, file: str) -> dict[str, Path]:
    """The file that holds each tensor of a Hugging Face folder."""
    index = folder / SAFETENSORS_INDEX
    if index.is_file() and file == SAFETENSORS_FILE:
        return _indexed_files(index)
    single = folder / file
    if single.is_file():
        return dict.fromkeys(open_safetensors(single).keys(), single)
    if any(folder.glob("pytorch_model*.bin")):
        raise UserError(
            f"{folder} holds weights as pickles (pytorch_model.bin), which can run code: "
            "save it as safetensors first"
        )
    raise UserError(f"{folder} has no {file}: it is not a Hugging Face model folder")


def _indexed_files(index: Path) -> dict[str, Path]:
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise UserError(f"{index} is not a safetensors index: copy the model again")
    files = {name: index.parent / Path(file).name for name, file in weight_map.items()}
    for path in sorted(set(files.values())):
        if not path.is_file():
            raise UserError(f"{index} names {path.name}, which is missing: copy the model again")
    return files
