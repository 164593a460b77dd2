"""Unpickling what a DCP step contains without running it.

DCP keeps a step's index `.metadata` as a pickle, and entries of a state as pickles too: as stock
readers load them, a checkpoint is a program. `load_index` knows the index's own classes and nothing
else; `load_entry` is `torch.load(weights_only=True)`.
"""

import io
import pathlib
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from flame.errors import UserError

UNPICKLING_ERRORS = (
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
"""What unpickling damaged or hostile bytes may raise."""

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


def load_entry(name: str, content: io.BytesIO) -> Any:
    """Unpickle an entry of a step as data: numbers, strings, containers and tensors on the CPU.

    Raises `UserError`, which names the entry, if the bytes are damaged or ask for anything else.
    """
    try:
        return torch.load(content, map_location="cpu", weights_only=True)
    except UNPICKLING_ERRORS as error:
        reason = type(error).__name__
        raise UserError(f"entry {name} of the checkpoint is not plain data: {reason}") from error


def load_index(content: bytes, path: Path) -> Metadata:
    """Unpickle a step's index, allowing the index's own classes only.

    Raises `UserError`, which names `path`, if the bytes ask for anything else or are no index.
    """
    try:
        index = _IndexUnpickler(io.BytesIO(content)).load()
    except _Forbidden as error:
        raise UserError(
            f"{path} asks for {error}, which no checkpoint index needs: do not use this file"
        ) from None
    except UNPICKLING_ERRORS as error:
        reason = type(error).__name__
        raise UserError(f"{path} is not a DCP index ({reason}): use another step") from error
    if not _is_index(index):
        raise UserError(f"{path} is not a DCP index: use another step")
    return index


class _Forbidden(pickle.UnpicklingError):
    """The index names a class or function that is not on the allow-list."""


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
    """Whether an unpickled value has the types of an index all the way down."""
    if not isinstance(index, Metadata) or not isinstance(index.storage_data, dict):
        return False
    entries = index.state_dict_metadata
    types = (TensorStorageMetadata, BytesStorageMetadata)
    return (
        isinstance(entries, dict)
        and all(isinstance(name, str) and isinstance(e, types) for name, e in entries.items())
        and all(isinstance(key, MetadataIndex) for key in index.storage_data)
        and all(isinstance(place, _StorageInfo) for place in index.storage_data.values())
    )
