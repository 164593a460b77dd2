"""Reading DCP checkpoints without running what they contain, and without trusting their bytes.

DCP keeps its index `.metadata` as a pickle, and some entries of a state as pickles too: as stock
readers load them, a checkpoint is a program. Here the index goes through an unpickler that knows
the index's own classes and nothing else, entries through `torch.load(weights_only=True)`, and every
file is compared with its recorded hash before it is used.
"""

import io
import math
import pathlib
import pickle
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from flame.errors import UserError, first_line, some
from flame.process.peers import Peers, raise_cause
from flame.storage.archive import locate, read_into
from flame.storage.checksums import (
    METADATA,
    HashAlong,
    check_file,
    check_hash,
    check_listed,
    hash_bytes,
    read_checksums,
    readable,
)

Check = Literal["first", "along", "never"]

_METADATA_CLASSES = (
    "Metadata",
    "MetadataIndex",
    "TensorStorageMetadata",
    "BytesStorageMetadata",
    "ChunkStorageMetadata",
    "TensorProperties",
    "StorageMeta",
    "_MEM_FORMAT_ENCODING",
)
_ALLOWED: dict[tuple[str, str], Any] = {
    **{(metadata.__name__, name): getattr(metadata, name) for name in _METADATA_CLASSES},
    (filesystem.__name__, "_StorageInfo"): _StorageInfo,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("collections", "OrderedDict"): dict,
    ("pathlib", "PosixPath"): pathlib.PurePosixPath,
    ("pathlib._local", "PosixPath"): pathlib.PurePosixPath,
}
_UNPICKLING_ERRORS = (
    pickle.UnpicklingError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)


def read_checkpoint(
    state_dict: dict[str, Any], step: Path, peers: Peers, optional: Collection[str] = ()
) -> None:
    """Load `state_dict` from a step; see `flame.checkpoint.steps.load_step`."""
    reader = SafeReader(step)
    # DCP would log a traceback and look for per-rank metadata, so the index is read beforehand.
    peers.agree(reader.read_metadata)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        try:
            dcp.load(
                state_dict,
                storage_reader=reader,
                planner=SafeLoadPlanner(optional),
                process_group=peers.group,
                no_dist=peers.alone,
            )
        except CheckpointException as error:
            raise_cause(error, f"cannot read {step}")


class SafeReader(FileSystemReader):
    """DCP's reader of step folders, with checked hashes and an allow-list for the index.

    Args:
        path: the step folder.
        check: when files are compared with their hashes. `first`: a file whole, before something
            in it is used. `along`: while they are read, so that a mismatch shows in `finish` only;
            for work that can be thrown away then. `never`: they have been, or will be.
    """

    def __init__(self, path: Path, check: Check = "first") -> None:
        super().__init__(path)
        self._check = check
        self._folder = Path(path)
        self._index: Metadata | None = None
        self._hashes: dict[str, str] = {}
        self._checked: set[str] = set()
        self._along: dict[str, HashAlong] = {}

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The step's index; raises `UserError` if it is missing, damaged or hostile."""
        if self._index is None:
            content = _read_index(self._folder / METADATA)
            self._hashes = read_checksums(self._folder)
            if hash_bytes(content) != self._hashes.get(METADATA):
                raise UserError(
                    f"{self._folder / METADATA} is damaged (its hash differs): use another step"
                )
            self._index = load_index(content, self._folder / METADATA)
            self.storage_data = self._index.storage_data
        return self._index

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read the items of `plan`, after checking the hash of each file once."""
        for item in plan.items:
            self._checked_entry(item)
        with self._explained(plan.items):
            return super().read_data(plan, planner)

    def read_rows(self, item: ReadItem, target: Tensor) -> bool:
        """Read whole rows of a stored chunk straight from its file, without unpickling numbers.

        Args:
            item: asks for rows of one chunk, whole along the other dimensions.
            target: contiguous, of the shape that the item asks for and the chunk's dtype.

        Returns:
            False if the chunk is not stored as one contiguous block: `read_data` can read it.
        """
        entry = self._checked_entry(item)
        if getattr(entry, "transform_descriptors", None):
            return False
        path = self._folder / entry.relative_path
        with self._explained([item]), open(path, "rb", buffering=0) as stream:
            place = locate(stream.fileno(), entry.offset, entry.length)
            if place is None or place.dtype != target.dtype:
                return False
            if place.shape[1:] != target.shape[1:] or len(place.shape) != target.dim():
                return False
            first = item.storage_offsets[0] if place.shape else 0
            if place.shape and first + target.shape[0] > place.shape[0]:
                return False
            skipped = first * math.prod(place.shape[1:]) * place.dtype.itemsize
            data = read_into(stream.fileno(), path, place.offset + skipped, target)
        if self._check == "along":
            with readable(path):
                self._hash_along(entry.relative_path).take(place.offset + skipped, data)
        return True

    def offset(self, index: MetadataIndex) -> int:
        """Where a stored chunk begins in its file; 0 if the step does not say."""
        entry = self.storage_data.get(index)
        return entry.offset if entry is not None else 0

    def finish(self) -> None:
        """Check the hash of every file of the step, from where it was taken `along` to."""
        for name in sorted(self._hashes):
            path = self._folder / name
            with readable(path):
                found = self._hash_along(name).finish()
            check_hash(path, found, self._hashes[name])

    @contextmanager
    def _explained(self, items: Sequence[ReadItem]) -> Iterator[None]:
        try:
            yield
        except (*_UNPICKLING_ERRORS, OSError) as error:
            entries = some(sorted({item.storage_index.fqn for item in items}), 3)
            raise UserError(
                f"cannot read {entries} of {self._folder}: {first_line(error)}"
            ) from error

    def _checked_entry(self, item: ReadItem) -> _StorageInfo:
        """Where an item is stored, its file checked as `check` says."""
        entry = self.storage_data.get(item.storage_index)
        if entry is None:
            name = item.storage_index.fqn
            raise UserError(f"{self._folder / METADATA} does not say where {name} is")
        name = entry.relative_path
        check_listed(self._folder, name, self._hashes)
        if self._check == "first" and name not in self._checked:
            check_file(self._folder, name, self._hashes)
            self._checked.add(name)
        return entry

    def _hash_along(self, name: str) -> HashAlong:
        if name not in self._along:
            self._along[name] = HashAlong(self._folder / name)
        return self._along[name]


class SafeLoadPlanner(DefaultLoadPlanner):
    """DCP's load planner with `weights_only=True` and complaints that a person can read.

    Args:
        optional: entries that keep the value which they have where the step lacks them.
    """

    def __init__(self, optional: Collection[str] = ()) -> None:
        super().__init__(allow_partial_load=bool(optional))
        self._optional = frozenset(optional)

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        saved = self.metadata.state_dict_metadata
        missing = sorted(set(self.state_dict) - set(saved) - self._optional)
        if missing:
            lacking = some(missing, 3)
            raise UserError(f"the checkpoint lacks {lacking}: it is of another model or run")
        for name in self.state_dict.keys() & saved.keys():
            value = self.state_dict[name]
            _check_kind(name, value, saved[name])
        return super().create_local_plan()

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        name = read_item.dest_index.fqn
        set_element(self.original_state_dict, self.mappings[name], load_bytes(name, value))


def load_bytes(name: str, value: io.BytesIO) -> Any:
    """Unpickle the entry `name` as data: numbers, strings, containers and tensors."""
    try:
        return torch.load(value, map_location="cpu", weights_only=True)
    except _UNPICKLING_ERRORS as error:
        reason = f"{type(error).__name__}"
        raise UserError(f"entry {name} of the checkpoint is not plain data: {reason}") from error


def load_index(content: bytes, path: Path) -> Metadata:
    """Unpickle DCP's index with nothing but its own classes; `path` is named in errors."""
    try:
        index = _IndexUnpickler(io.BytesIO(content)).load()
    except _Forbidden as error:
        raise UserError(
            f"{path} asks for {error}, which no checkpoint index needs: do not use this file"
        ) from None
    except _UNPICKLING_ERRORS as error:
        reason = type(error).__name__
        raise UserError(f"{path} is not a DCP index ({reason}): use another step") from error
    if not _is_index(index):
        raise UserError(f"{path} is not a DCP index: use another step")
    return index


class _Forbidden(pickle.UnpicklingError):
    """The index names a class or function that is not on the list."""


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = _ALLOWED.get((module, name))
        if found is None and module == "torch" and "." not in name:
            candidate = getattr(torch, name, None)
            found = candidate if isinstance(candidate, torch.dtype) else None
        if found is None:
            raise _Forbidden(f"{module}.{name}")
        return found


def _is_index(index: Any) -> bool:
    if not isinstance(index, Metadata) or not isinstance(index.storage_data, dict):
        return False
    entries = index.state_dict_metadata
    kinds = (TensorStorageMetadata, BytesStorageMetadata)
    return (
        isinstance(entries, dict)
        and all(isinstance(name, str) and isinstance(e, kinds) for name, e in entries.items())
        and all(isinstance(key, MetadataIndex) for key in index.storage_data)
        and all(isinstance(place, _StorageInfo) for place in index.storage_data.values())
    )


def _read_index(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path} is missing: the step was not written to its end") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def _check_kind(name: str, value: Any, saved: Any) -> None:
    if not isinstance(saved, TensorStorageMetadata):
        return
    if not isinstance(value, torch.Tensor):
        raise UserError(f"the checkpoint's {name} is a tensor, this run expects another value")
    if value.shape != saved.size:
        raise UserError(
            f"the checkpoint's {name} has shape {tuple(saved.size)}, this run expects "
            f"{tuple(value.shape)}: it is of another model"
        )
