"""Reading what `torch.save` wrote, as data: numbers, strings, containers and tensors.

An archive is a zip that holds a pickle, which describes the value, and the tensors' numbers as they
were in memory. The pickle is read by a machine that runs no code, and a tensor, or rows of it,
straight into place from the file, without reading anything else. Whatever the archive says of its
sizes, memory stays within a few times its length.
"""

import math
import os
import pickle
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flame.storage.input_file import read_into
from flame.unpickling.machine import MAX_DEPTH, PlainUnpickler
from flame.unpickling.values import Factory, RefusedError, find_dtype, size_of, spelled
from flame.unpickling.zip_directory import Span, entries

MAX_PICKLE = 4 << 20
"""Bytes of the pickle in an archive; the numbers of tensors lie beside it."""

ARCHIVE_ERRORS = (zipfile.BadZipFile, pickle.UnpicklingError)
"""What reading a damaged or hostile archive raises here."""

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}
"""Dtypes by the names of their storages in the pickle."""


@dataclass(frozen=True)
class Block:
    """A contiguous tensor in a file."""

    offset: int
    """Position of the tensor's first byte in the file."""
    shape: tuple[int, ...]
    dtype: torch.dtype


def locate(descriptor: int, start: int, length: int) -> Block | None:
    """Return where the numbers of an archived tensor lie, None if they are not one plain block.

    Args:
        descriptor: file descriptor of the open file.
        start: first byte of the archive in the file.
        length: bytes that `torch.save` wrote for this one tensor.

    Raises:
        zipfile.BadZipFile, pickle.UnpicklingError: the archive is damaged, or no plain data.
    """
    value = _describe(descriptor, start, length)
    if not isinstance(value, _Description) or not value.is_block:
        return None
    return Block(value.first, value.shape, value.dtype)


def load(descriptor: int, path: Path, start: int, length: int) -> Any:
    """Return the archived value: numbers, strings, containers, and tensors on the CPU.

    Arguments and errors are those of `locate` and `read_into`.
    """
    return _Reader(descriptor, path, length).read(_describe(descriptor, start, length))


class _Storage(NamedTuple):
    dtype: torch.dtype | None
    """None for bytes, which get a dtype from the tensor that uses them."""
    place: Span


class _StorageType(NamedTuple):
    dtype: torch.dtype | None


class _Description(NamedTuple):
    """A tensor that is not read yet."""

    first: int
    """Position in the file of the element with index 0 in every dimension."""
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def reach(self) -> int:
        """Elements from the first to the last in memory, both included; 0 for an empty tensor."""
        if 0 in self.shape:
            return 0
        return 1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))

    @property
    def is_block(self) -> bool:
        """Whether the elements lie in order, without gaps."""
        step = 1
        for size, found in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and found != step:
                return False
            step *= size
        return True


def _describe(descriptor: int, start: int, length: int) -> Any:
    """Return the archived value with a `_Description` in the place of each tensor."""
    found = entries(descriptor, start, length)
    if "data.pkl" not in found or found["data.pkl"].length > MAX_PICKLE:
        raise RefusedError("it holds no pickle, or one that is too long")
    order = found.get("byteorder")
    if order is not None and order.length < 16:
        if os.pread(descriptor, order.length, order.offset).decode("latin-1") != sys.byteorder:
            raise RefusedError("its numbers are in the byte order of another kind of processor")
    place = found["data.pkl"]
    content = os.pread(descriptor, place.length, place.offset)
    return PlainUnpickler(content, _find_global, lambda pid: _storage(pid, found)).load()


class _Reader:
    """Replaces descriptions by tensors, whose bytes together are at most the archive's."""

    def __init__(self, descriptor: int, path: Path, length: int) -> None:
        self._descriptor, self._path, self._left = descriptor, path, length

    def read(self, value: Any, depth: int = 0) -> Any:
        if depth > MAX_DEPTH:
            raise RefusedError(f"it is nested more than {MAX_DEPTH} deep")
        if isinstance(value, _Description):
            return self._tensor(value)
        if isinstance(value, _Storage | _StorageType | Factory):
            raise RefusedError("it holds a storage or a class by itself")
        if type(value) is dict:
            return {key: self.read(inner, depth + 1) for key, inner in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self.read(inner, depth + 1) for inner in value)
        return value

    def _tensor(self, described: _Description) -> Tensor:
        self._left -= described.reach * described.dtype.itemsize
        if self._left < 0:
            raise RefusedError("its tensors together are larger than the archive")
        memory = torch.empty(described.reach, dtype=described.dtype)
        read_into(self._descriptor, self._path, described.first, memory)
        if not described.reach:
            return memory.view(described.shape)
        return memory.as_strided(described.shape, described.stride)


def _storage(pid: Any, found: Mapping[str, Span]) -> _Storage:
    """Return the storage that a persistent id names."""
    if type(pid) is not tuple or len(pid) != 5 or pid[0] != "storage":
        raise RefusedError("it refers to what is no storage")
    _, kind, key, _, _ = pid
    if not isinstance(kind, _StorageType) or type(key) is not str or f"data/{key}" not in found:
        raise RefusedError("it refers to a storage that it does not hold")
    return _Storage(kind.dtype, found[f"data/{key}"])


def _tensor(
    storage: Any,
    offset: Any,
    shape: Any,
    stride: Any,
    requires_grad: Any = False,
    hooks: Any = None,
    metadata: Any = None,
) -> _Description:
    """Stand in for torch's `_rebuild_tensor_v2`: check the arguments and note the place."""
    shape, stride = tuple(size_of(shape)), tuple(size_of(stride))
    if type(storage) is not _Storage or storage.dtype is None or len(shape) != len(stride):
        raise RefusedError("it holds a tensor of another form")
    if metadata:
        raise RefusedError("a tensor is a conjugate or negative view")
    (offset,) = size_of((offset,))
    itemsize = storage.dtype.itemsize
    made = _Description(storage.place.offset + offset * itemsize, shape, stride, storage.dtype)
    if math.prod(shape) > made.reach or (offset + made.reach) * itemsize > storage.place.length:
        raise RefusedError("a tensor reaches beyond its numbers")
    return made


def _tensor_of_bytes(
    storage: Any,
    offset: Any,
    shape: Any,
    stride: Any,
    requires_grad: Any,
    hooks: Any,
    dtype: Any,
    metadata: Any = None,
) -> _Description:
    """Stand in for torch's `_rebuild_tensor_v3`, which gives bytes a dtype."""
    if type(storage) is not _Storage or not isinstance(dtype, torch.dtype):
        raise RefusedError("it holds a tensor of another form")
    typed = _Storage(dtype, storage.place)
    return _tensor(typed, offset, shape, stride, requires_grad, hooks, metadata)


def _parameter(data: Any, requires_grad: Any, hooks: Any) -> _Description:
    if type(data) is not _Description:
        raise RefusedError("a parameter holds no tensor")
    return data


_FUNCTIONS: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): Factory(call=_tensor),
    ("torch._utils", "_rebuild_tensor_v3"): Factory(call=_tensor_of_bytes),
    ("torch._utils", "_rebuild_parameter"): Factory(call=_parameter),
    ("torch", "Size"): Factory(call=size_of),
    ("collections", "OrderedDict"): Factory(call=lambda: {}),
    ("torch.storage", "UntypedStorage"): _StorageType(None),
    **{("torch", name): _StorageType(dtype) for name, dtype in _STORAGES.items()},
}


def _find_global(module: str, name: str) -> Any:
    found = _FUNCTIONS.get((module, name)) or find_dtype(module, name)
    if found is None:
        raise RefusedError(f"{spelled(module, name)} is no part of plain data")
    return found
