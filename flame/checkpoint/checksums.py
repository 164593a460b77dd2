"""A hash per file of a step folder, kept in `checksums.json`.

The file is written before `.metadata` and covers `.metadata` too, so a step that has both was
written to its end. Hashes are XXH3 with 128 bits: they find damage, they do not prove origin.
"""

import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from flame.errors import UserError

ALGORITHM = "xxh3_128"
CHECKSUMS = "checksums.json"
METADATA = ".metadata"
"""DCP's index of a step."""
_BLOCK = 8 << 20


def hash_bytes(data: bytes) -> str:
    """The hash of `data`, 32 hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(data)


def hash_file(path: Path) -> str:
    """The hash of a file, read in blocks of 8 MiB."""
    hasher = xxhash.xxh3_128()
    block = memoryview(bytearray(_BLOCK))
    with open(path, "rb", buffering=0) as stream:
        while size := stream.readinto(block):
            hasher.update(block[:size])
    return hasher.hexdigest()


class HashingFile(io.BufferedWriter):
    """A new file that hashes what is written to it, in order."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path, "wb"), buffer_size=1 << 20)
        self._hasher = xxhash.xxh3_128()

    def write(self, data: Any, /) -> int:
        self._hasher.update(data)
        return super().write(data)

    def finish(self) -> str:
        """Bring the content to the disk and return its hash."""
        self.flush()
        os.fsync(self.fileno())
        return self._hasher.hexdigest()


def write_file(path: Path, data: bytes) -> str:
    """Write a small file through to the disk; return its hash."""
    with HashingFile(path) as stream:
        stream.write(data)
        return stream.finish()


def write_checksums(folder: Path, hashes: Mapping[str, str]) -> None:
    """Write `checksums.json` for files of `folder`, by name."""
    content = {"algorithm": ALGORITHM, "files": dict(sorted(hashes.items()))}
    write_file(folder / CHECKSUMS, (json.dumps(content, indent=1) + "\n").encode())


def read_checksums(folder: Path) -> dict[str, str]:
    """The hash of each file of a step, by name; raises `UserError` if the list is not usable."""
    path = folder / CHECKSUMS
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(
            f"{folder} has no {CHECKSUMS}: it was not written to its end, or not by slimstate; "
            "use another step"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}): use another step") from error
    if not _is_valid(content):
        raise UserError(f"{path} is not a list of {ALGORITHM} hashes: use another step")
    return content["files"]


def check_file(folder: Path, name: str, hashes: Mapping[str, str]) -> None:
    """Raise `UserError` unless the file `name` has the hash that was recorded for it."""
    path = folder / name
    if name not in hashes:
        raise UserError(f"{path} is not listed in {CHECKSUMS}: use another step")
    try:
        found = hash_file(path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: use another step") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    if found != hashes[name]:
        raise UserError(f"{path} is damaged (its hash differs): use another step or copy it again")


def _is_valid(content: Any) -> bool:
    if not isinstance(content, dict) or content.get("algorithm") != ALGORITHM:
        return False
    files = content.get("files")
    return isinstance(files, dict) and all(
        isinstance(value, str) and _is_plain(name) for name, value in files.items()
    )


def _is_plain(name: str) -> bool:
    return name not in ("", ".", "..") and "/" not in name and "\0" not in name
