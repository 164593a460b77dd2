"""A step's index `.metadata`, unpickled without running it.

DCP keeps the index as a pickle: as stock readers load it, a checkpoint is a program. Here a machine
that knows data only reads it, and makes objects of the index's own classes and nothing else, each
with its attributes' types checked.
"""

import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from flame.errors import UserError
from flame.storage.checksums import missing
from flame.storage.input_file import opened
from flame.unpickling.index_check import check_index
from flame.unpickling.machine import PlainUnpickler
from flame.unpickling.values import Factory, RefusedError, find_dtype, size_of, spelled

_SMALL_INDEX = 4 << 20
"""Bytes that any step's index may have."""
_INDEX_SHARE = 16
"""A larger index may have one byte for as many bytes of the step."""


class ForbiddenError(RefusedError):
    """The pickle names a class or function that is not on the allow-list."""


def read_index(path: Path) -> bytes:
    """Return a step's index; raise `UserError` if it is out of proportion to the step."""
    with opened(path, missing(path)) as descriptor:
        size = os.fstat(descriptor).st_size
        if size > _SMALL_INDEX:
            step = sum(entry.stat().st_size for entry in os.scandir(path.parent))
            if size > step / _INDEX_SHARE:
                raise UserError(
                    f"{path} is not a DCP index: it has {size:,} bytes for a step of {step:,}"
                )
        return os.pread(descriptor, size, 0)


def load_index(content: bytes, path: Path) -> Metadata:
    """Return the step's index that `content` pickles.

    Raises:
        UserError: naming `path`: the bytes ask for other classes, are no index, or describe tensors
            that the stored chunks do not make up exactly.
    """
    try:
        index = PlainUnpickler(content, _find_global, keys=(MetadataIndex,)).load()
    except ForbiddenError as error:
        raise UserError(
            f"{path} asks for {error}, which no checkpoint index needs: do not use this file"
        ) from None
    except RefusedError as error:
        raise UserError(f"{path} is not a DCP index ({error}): use another step") from None
    check_index(index, path)
    return index


def _find_global(module: str, name: str) -> Any:
    found = _ALLOWED.get((module, name)) or find_dtype(module, name)
    if found is None:
        raise ForbiddenError(spelled(module, name))
    return found


def _layout(name: Any) -> torch.layout:
    if name != "torch.strided":
        raise RefusedError(f"a tensor has the layout {name!r:.40}: only dense tensors can be read")
    return torch.strided


def _memory_format(number: Any) -> Any:
    if type(number) is not int:
        raise RefusedError("a memory format is no number")
    return metadata._MEM_FORMAT_ENCODING(number)


def _path(*parts: Any) -> str:
    if not all(type(part) is str for part in parts):
        raise RefusedError("a path has parts that are no strings")
    return str(PurePosixPath(*parts))


def _record(cls: type, fields: Mapping[str, tuple[type, ...]]) -> Factory:
    """Return a factory of `cls`, whose pickled state is a dict; unknown fields are left out."""

    def fill(target: Any, state: Any) -> None:
        if type(state) is not dict:
            raise RefusedError(f"a {cls.__name__} has no state")
        for name, kinds in fields.items():
            if type(state.get(name)) not in kinds:
                raise RefusedError(f"the {name} of a {cls.__name__} is of a wrong type")
            target.__dict__[name] = state.get(name)

    return Factory(new=lambda: object.__new__(cls), fill=fill)


def _fill_properties(target: Any, state: Any) -> None:
    """Give TensorProperties its state: five values, or more in later versions of torch."""
    if type(state) is not tuple or len(state) < 5 or not isinstance(state[0], torch.dtype):
        raise RefusedError("the properties of a tensor are of another form")
    kinds = (torch.dtype, torch.layout, bool, metadata._MEM_FORMAT_ENCODING, bool)
    if not all(isinstance(value, kind) for value, kind in zip(state, kinds, strict=False)):
        raise RefusedError("the properties of a tensor are of wrong types")
    TensorProperties.__setstate__(target, state[:5])


_NONE = type(None)
_PROPERTIES = Factory(
    new=lambda: object.__new__(TensorProperties),
    fill=_fill_properties,
)
_RECORDS: dict[type, dict[str, tuple[type, ...]]] = {
    Metadata: {
        "state_dict_metadata": (dict,),
        "planner_data": (dict, _NONE),
        "storage_data": (dict,),
        "storage_meta": (StorageMeta, _NONE),
        "version": (str, _NONE),
    },
    MetadataIndex: {
        "fqn": (str,),
        "offset": (torch.Size, _NONE),
        "index": (int, _NONE),
    },
    TensorStorageMetadata: {
        "properties": (TensorProperties,),
        "size": (torch.Size,),
        "chunks": (list,),
    },
    ChunkStorageMetadata: {"offsets": (torch.Size,), "sizes": (torch.Size,)},
    BytesStorageMetadata: {},
    StorageMeta: {
        "checkpoint_id": (str, _NONE),
        "save_id": (str, _NONE),
        "load_id": (str, _NONE),
        "modules": (list, _NONE),
    },
    _StorageInfo: {
        "relative_path": (str,),
        "offset": (int,),
        "length": (int,),
        "transform_descriptors": (list, tuple, _NONE),
    },
}
_ALLOWED: dict[tuple[str, str], Factory] = {
    **{(cls.__module__, cls.__name__): _record(cls, kinds) for cls, kinds in _RECORDS.items()},
    (metadata.__name__, "TensorProperties"): _PROPERTIES,
    (metadata.__name__, "_MEM_FORMAT_ENCODING"): Factory(call=_memory_format),
    (filesystem.__name__, "_StorageInfo"): _record(_StorageInfo, _RECORDS[_StorageInfo]),
    ("torch", "Size"): Factory(call=size_of),
    ("torch.serialization", "_get_layout"): Factory(call=_layout),
    ("collections", "OrderedDict"): Factory(call=lambda: {}),
    ("pathlib", "PosixPath"): Factory(call=_path),
    ("pathlib._local", "PosixPath"): Factory(call=_path),
}
