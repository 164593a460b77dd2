"""Where the entries of an uncompressed zip lie in a file, without reading what is in them.

`torch.save` never compresses. So an entry's bytes are part of the file, and nothing here grows
beyond the file's own size, whatever the headers say.
"""

import io
import os
import struct
import zipfile
from typing import NamedTuple

_MAX_DIRECTORY = 1 << 20
"""Bytes of the zip's directory: about 10,000 entries; a tensor's archive has seven."""
_LOCAL_HEADER = 30
"""Bytes of an entry's header before its name; the last four are the lengths of two fields."""
_SIGNATURE = b"PK\x03\x04"


class Span(NamedTuple):
    """Bytes of a file."""

    offset: int
    """Position of the first byte in the file."""
    length: int


def entries(descriptor: int, start: int, length: int) -> dict[str, Span]:
    """Return the place in the file of each entry of a zip, by its name below the zip's one folder.

    Args:
        descriptor: file descriptor of the open file.
        start: first byte of the zip in the file.
        length: bytes of the zip.

    Raises:
        zipfile.BadZipFile: it is no zip, an entry is compressed or reaches beyond the zip, or two
            have one name.
    """
    window = _Window(descriptor, start, length)
    try:
        with zipfile.ZipFile(window) as archive:
            infos = archive.infolist()
    except (NotImplementedError, OverflowError, ValueError, struct.error) as error:
        raise zipfile.BadZipFile(str(error)) from error
    found: dict[str, Span] = {}
    for info in infos:
        name = info.filename.partition("/")[2]
        if name in found:
            raise zipfile.BadZipFile(f"two entries are called {name!r:.80}")
        found[name] = _span(window, start, length, info)
    return found


def _span(window: "_Window", start: int, length: int, info: zipfile.ZipInfo) -> Span:
    stored = info.compress_type == zipfile.ZIP_STORED and info.compress_size == info.file_size
    if not stored or info.flag_bits & 1:
        raise zipfile.BadZipFile(f"{info.filename!r:.80} is compressed or encrypted")
    window.seek(info.header_offset)
    header = window.read(_LOCAL_HEADER)
    if len(header) != _LOCAL_HEADER or not header.startswith(_SIGNATURE):
        raise zipfile.BadZipFile(f"{info.filename!r:.80} has no header")
    name, extra = struct.unpack("<HH", header[-4:])
    offset = info.header_offset + _LOCAL_HEADER + name + extra
    if offset + info.file_size > length:
        raise zipfile.BadZipFile(f"{info.filename!r:.80} reaches beyond the archive")
    return Span(start + offset, info.file_size)


class _Window(io.RawIOBase):
    """`length` bytes of a file, from `start` on, as a stream that reads little at a time."""

    def __init__(self, descriptor: int, start: int, length: int) -> None:
        self._descriptor, self._start, self._length = descriptor, start, length
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        if origin + offset < 0:
            raise OSError("seek before the start")
        self._position = origin + offset
        return self._position

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._length - self._position)
        size = left if size < 0 else min(size, left)
        if size > _MAX_DIRECTORY:
            raise zipfile.BadZipFile(f"its directory has {size} bytes")
        data = os.pread(self._descriptor, size, self._start + self._position)
        self._position += len(data)
        return data
