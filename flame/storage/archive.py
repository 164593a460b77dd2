"""Finding the numbers of a tensor in a file that `torch.save` wrote.

A tensor, or rows of it, can then be read straight into place, without a copy and without reading
anything else. An archive is a zip that holds a pickle, which describes the tensor, and the numbers
as they were in memory. The unpickler here knows such descriptions and nothing else.
"""

import collections
import io
import os
import pickle
import struct
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flame.errors import UserError

BLOCK = 8 << 20
"""Bytes that are read at a time."""

READ_AHEAD = 32 << 20
"""Bytes that the operating system may read ahead."""

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
}
"""Dtypes by their names in the pickle; tensors of other dtypes are left to `torch.load`."""

_LOCAL_HEADER = 30
"""Bytes of a zip entry's header before its name; the last four are the lengths of two fields."""


@dataclass(frozen=True)
class Block:
    """A contiguous tensor in a file."""

    offset: int
    """Position of the tensor's first byte in the file."""
    shape: tuple[int, ...]
    dtype: torch.dtype


def locate(descriptor: int, start: int, length: int) -> Block | None:
    """Return where the numbers of an archived tensor lie, None unless they are one plain block.

    Args:
        descriptor: file descriptor of the open file.
        start: first byte of the archive in the file.
        length: bytes that `torch.save` wrote for this one tensor.
    """
    archive = io.BufferedReader(_Window(descriptor, start, length), 4096)
    try:
        with zipfile.ZipFile(archive) as entries:
            names = {name.partition("/")[2]: name for name in entries.namelist()}
            if entries.read(names["byteorder"]).decode() != sys.byteorder:
                return None
            with entries.open(names["data.pkl"]) as stream:
                tensor = _DescriptionUnpickler(stream).load()
            entry = entries.getinfo(names[f"data/{tensor.storage.key}"])
    except (zipfile.BadZipFile, pickle.UnpicklingError, LookupError, AttributeError, EOFError):
        return None
    if not isinstance(tensor, _Description) or not _is_plain(tensor, entry):
        return None
    dtype = tensor.storage.dtype
    offset = start + _data_offset(archive, entry) + tensor.offset * dtype.itemsize
    return Block(offset, tensor.shape, dtype)


def read_into(descriptor: int, path: Path, offset: int, target: Tensor) -> memoryview:
    """Fill a contiguous CPU tensor with the bytes of a file from `offset` on.

    Afterwards the operating system is asked to read ahead, as what follows is likely to be next.

    Args:
        descriptor: file descriptor of the open file.
        path: the file's name, for messages.

    Returns:
        The bytes of the tensor.

    Raises:
        UserError: the file ends before the tensor does, or cannot be read.
    """
    view = memoryview(target.detach().view(-1).view(torch.uint8).numpy())
    done = 0
    while done < len(view):
        try:
            size = os.preadv(descriptor, [view[done : done + BLOCK]], offset + done)
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error
        if size == 0:
            raise UserError(f"cannot read {path}: it ends too early; copy it again")
        done += size
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, offset + done, READ_AHEAD, os.POSIX_FADV_WILLNEED)
    return view


class _Window(io.RawIOBase):
    """`length` bytes of a file, from `start` on, as a stream of their own."""

    def __init__(self, descriptor: int, start: int, length: int) -> None:
        self._descriptor, self._start, self._length = descriptor, start, length
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        self._position = max(0, origin + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        wanted = memoryview(buffer)[: max(0, self._length - self._position)]
        size = os.preadv(self._descriptor, [wanted], self._start + self._position) if wanted else 0
        self._position += size
        return size


class _Storage(NamedTuple):
    dtype: torch.dtype
    key: str


class _Description(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def _description(
    storage: _Storage,
    offset: int,
    shape: Any,
    stride: Any,
    requires_grad: bool,
    hooks: Any,
    metadata: Any = None,
) -> _Description:
    """Stand in for torch's `_rebuild_tensor_v2`: note the arguments instead of building."""
    if metadata:
        raise pickle.UnpicklingError("the tensor is a conjugate or negative view")
    return _Description(storage, offset, tuple(shape), tuple(stride))


class _DescriptionUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _description
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module != "torch" or name not in _STORAGES:
            raise pickle.UnpicklingError(f"{module}.{name} does not describe a plain tensor")
        return _STORAGES[name]

    def persistent_load(self, pid: Any) -> _Storage:
        _, dtype, key, *_ = pid
        return _Storage(dtype, key)


def _is_plain(tensor: _Description, entry: zipfile.ZipInfo) -> bool:
    """Whether the tensor's numbers lie in order in its storage, whole and uncompressed."""
    step = 1
    strides: list[int] = []
    for size in reversed(tensor.shape):
        strides.insert(0, step)
        step *= size
    stop = (tensor.offset + step) * tensor.storage.dtype.itemsize
    ordered = all(
        size == 1 or found == expected
        for size, found, expected in zip(tensor.shape, tensor.stride, strides, strict=True)
    )
    return ordered and entry.compress_type == zipfile.ZIP_STORED and stop <= entry.file_size


def _data_offset(archive: Any, entry: zipfile.ZipInfo) -> int:
    archive.seek(entry.header_offset)
    name, extra = struct.unpack("<HH", archive.read(_LOCAL_HEADER)[-4:])
    return entry.header_offset + _LOCAL_HEADER + name + extra
