"""A hash per file of a step folder, kept in `checksums.json`.

The file is written before `.metadata` and covers `.metadata` too, so a step that has both was
written to its end. Hashes are XXH3 with 128 bits: they find damage, they do not prove origin.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import xxhash

from flame.errors import UserError
from flame.storage.direct_file import DirectFile
from flame.storage.input_file import opened
from flame.storage.json_file import read_object

ALGORITHM = "xxh3_128"
CHECKSUMS = "checksums.json"
METADATA = ".metadata"
"""DCP's index of a step."""
_BLOCK = 1 << 20
_PART = 256 << 20
"""Bytes between two answers of whoever hashes a large file."""


def hash_bytes(data: bytes) -> str:
    """Return the hash of `data` as 32 hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(data)


def hash_file(path: Path) -> str:
    """Return the hash of a whole file as 32 hexadecimal digits; raise `UserError` if unreadable."""
    return HashAlong(path).finish()


class HashAlong:
    """Hashes a file while others read parts of it, so that most bytes are read only once.

    Parts that come in the order of the file are hashed as they are. Bytes between parts, and parts
    that come out of order, are read from the file when their turn comes.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._hasher = xxhash.xxh3_128()
        self._done = 0

    def take(self, offset: int, data: memoryview) -> None:
        """Hash `data`, which was read at `offset`, after what lies before it."""
        if offset < self._done:
            return
        self._advance(offset)
        self._hasher.update(data)
        self._done += len(data)

    def finish(self) -> str:
        """Hash the rest of the file and return the hash of the whole."""
        self._advance(None)
        return self._hasher.hexdigest()

    def parts(self) -> Iterator[int]:
        """Hash the rest of the file and yield the bytes of each part, for `finish` after it."""
        size = self._path_size()
        while self._done < size:
            before = self._done
            self._advance(min(self._done + _PART, size))
            if self._done == before:
                return
            yield self._done - before

    def _path_size(self) -> int:
        with opened(self._path, missing(self._path)) as descriptor:
            return os.fstat(descriptor).st_size

    def _advance(self, stop: int | None) -> None:
        """Read and hash the file up to offset `stop`; None means to its end."""
        block = memoryview(bytearray(_BLOCK if stop is None else min(stop - self._done, _BLOCK)))
        with opened(self._path, missing(self._path)) as descriptor:
            while stop is None or self._done < stop:
                wanted = block if stop is None else block[: stop - self._done]
                size = os.preadv(descriptor, [wanted], self._done)
                if not size:
                    break
                self._hasher.update(block[:size])
                self._done += size


class HashingFile:
    """A new file whose content is hashed while it is written; a context manager closes it."""

    def __init__(self, path: Path) -> None:
        self._file = DirectFile(path)
        self._hasher = xxhash.xxh3_128()

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        for first in range(0, len(view), _BLOCK):
            # A block at a time, so that it is copied while it is in the processor's cache.
            block = view[first : first + _BLOCK]
            self._hasher.update(block)
            self._file.write(block)
        return len(view)

    def tell(self) -> int:
        return self._file.tell()

    def flush(self) -> None:
        """Do nothing; `torch.save` calls it, but only `finish` brings the content to the disk."""

    def finish(self) -> str:
        """Bring the content to the disk, close the file and return its hash."""
        self._file.finish()
        return self._hasher.hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


def write_file(path: Path, data: bytes) -> str:
    """Write a small file through to the disk and return its hash."""
    with HashingFile(path) as stream:
        stream.write(data)
        return stream.finish()


def write_checksums(folder: Path, hashes: Mapping[str, str]) -> None:
    """Write `checksums.json` into `folder`; `hashes` maps file names to hashes."""
    content = {"algorithm": ALGORITHM, "files": dict(sorted(hashes.items()))}
    write_file(folder / CHECKSUMS, (json.dumps(content, indent=1) + "\n").encode())


def read_checksums(folder: Path) -> dict[str, str]:
    """Return the recorded hash of each file of a step, by file name.

    Raises `UserError` if `checksums.json` is missing, cannot be read or is malformed.
    """
    path = folder / CHECKSUMS
    content = read_object(
        path,
        missing=f"{folder} has no {CHECKSUMS}: it was not written to its end, or not by slimstate; "
        "use another step",
    )
    if not _is_valid(content):
        raise UserError(f"{path} is not a list of {ALGORITHM} hashes: use another step")
    return content["files"]


def check_file(folder: Path, name: str, hashes: Mapping[str, str]) -> None:
    """Raise `UserError` unless the file `name` has the hash that was recorded for it."""
    for _ in checked_parts(folder, name, hashes):
        pass


def checked_parts(folder: Path, name: str, hashes: Mapping[str, str]) -> Iterator[int]:
    """Compare a file with its hash as `check_file` does; yield the bytes of each part of it."""
    path = folder / name
    check_listed(folder, name, hashes)
    hasher = HashAlong(path)
    yield from hasher.parts()
    check_hash(path, hasher.finish(), hashes[name])


def check_listed(folder: Path, name: str, hashes: Mapping[str, str]) -> None:
    """Raise `UserError` unless a hash was recorded for the file `name`."""
    if name not in hashes:
        raise UserError(f"{folder / name} is not listed in {CHECKSUMS}: use another step")


def check_hash(path: Path, found: str, recorded: str) -> None:
    """Raise `UserError` unless a file has the hash that was recorded for it."""
    if found != recorded:
        raise UserError(f"{path} is damaged (its hash differs): use another step or copy it again")


def missing(path: Path) -> str:
    """Return the message for a file of a step that does not exist."""
    return f"{path} is missing: use another step"


def _is_valid(content: Mapping[str, Any]) -> bool:
    if content.get("algorithm") != ALGORITHM:
        return False
    files = content.get("files")
    return isinstance(files, dict) and all(
        isinstance(value, str) and _is_plain(name) for name, value in files.items()
    )


def _is_plain(name: str) -> bool:
    return name not in ("", ".", "..") and "/" not in name and "\0" not in name
