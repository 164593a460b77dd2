"""Writing and reading safetensors files tensor by tensor, so that memory holds only one.

The format (github.com/huggingface/safetensors) is the header's length in 8 bytes, little-endian;
the header in JSON, with each tensor's dtype, shape and position; the tensors' bytes without gaps.
"""

import json
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flame.errors import UserError, first_line
from flame.storage.direct_file import DirectFile
from flame.storage.input_file import read_into

DTYPES = {
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
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_METADATA = "__metadata__"
_LENGTH_BYTES = 8
_ALIGNMENT = 8
"""The header is padded, so that the tensors begin at a multiple of this many bytes."""


@dataclass(frozen=True)
class Entry:
    """What a file's header says of a tensor."""

    shape: tuple[int, ...]
    code: str
    """The dtype as the format names it, such as `BF16`."""
    offset: int
    """Position of the tensor's first byte in the file."""


class SafetensorsFile:
    """A file to read tensors from, checked when it is opened: header and length fit together.

    Only the header is read then, so a file may be larger than memory.

    Raises:
        UserError: the file is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        _check(path)
        self.path = path
        with open(path, "rb") as stream:
            length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
            header = json.loads(stream.read(length))
        start = _LENGTH_BYTES + length
        self.entries = {
            name: Entry(tuple(entry["shape"]), entry["dtype"], start + entry["data_offsets"][0])
            for name, entry in header.items()
            if name != _METADATA
        }

    def keys(self) -> list[str]:
        """Return the names of the tensors, sorted."""
        return sorted(self.entries)

    def promise(self, name: str) -> Tensor:
        """Return a meta-device tensor of the stored shape and dtype."""
        entry = self.entries[name]
        return torch.empty(entry.shape, dtype=DTYPES[entry.code], device="meta")

    def get_tensor(self, name: str) -> Tensor:
        """Return a tensor as a new one, in the stored dtype."""
        shape = self.entries[name].shape
        return self.read(name, 0, shape[0] if shape else 0)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows `start:stop` of a tensor, or a whole scalar, in the stored dtype."""
        entry = self.entries[name]
        shape = (stop - start, *entry.shape[1:]) if entry.shape else ()
        target = torch.empty(shape, dtype=DTYPES[entry.code])
        row = torch.Size(entry.shape[1:]).numel() * target.element_size()
        try:
            with open(self.path, "rb", buffering=0) as stream:
                read_into(stream.fileno(), self.path, entry.offset + start * row, target)
        except OSError as error:
            raise UserError(f"cannot read {name} of {self.path}: {error.strerror}") from error
        return target


def write_safetensors(
    path: Path,
    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    read: Callable[[str], Tensor],
) -> None:
    """Write a safetensors file through to the disk.

    Args:
        path: the file, which is replaced if it exists.
        tensors: shape and dtype of each tensor by name; the widest dtype comes first in the file,
            and within a dtype names are sorted.
        read: returns a tensor by its name; called once for each, in the order of the file.

    Raises:
        ValueError: `read` returns another shape or dtype.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name][1].itemsize, name))
    with closing(DirectFile(path)) as file:
        file.write(memoryview(_header(order, tensors)))
        for name in order:
            file.write(_bytes(name, read(name), tensors[name]))
        file.finish()


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors in memory as a safetensors file, readable for whom the umask says.

    The safetensors library makes files that only their owner can read, whatever the umask.
    """
    forms = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    write_safetensors(path, forms, lambda name: tensors[name])


def _check(path: Path) -> None:
    """Raise `UserError` if a file is missing, or its header is not what its length allows."""
    try:
        # For torch the library would map the file as if all of it were to be written: the system
        # refuses that for a file larger than memory.
        with safe_open(path, framework="np"):
            pass
    except FileNotFoundError:
        raise UserError(f"{path} is missing: copy the model again") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged ({first_line(error)}): copy the model again") from error


def _header(order: list[str], tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> bytes:
    header: dict[str, Any] = {_METADATA: {"format": "pt"}}
    end = 0
    for name in order:
        shape, dtype = tensors[name]
        begin, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def _bytes(name: str, tensor: Tensor, promised: tuple[tuple[int, ...], torch.dtype]) -> memoryview:
    if (tuple(tensor.shape), tensor.dtype) != promised:
        raise ValueError(f"{name}: promised {promised}, read {tensor.shape} {tensor.dtype}")
    flat = tensor.detach().cpu().contiguous().view(-1)
    return memoryview(flat.view(torch.uint8).numpy())
