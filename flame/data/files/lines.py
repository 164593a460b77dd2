"""JSON lines, in blocks of bytes that can be read alone; compressed files are one block."""

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from flame.data.files.bad_rows import Unreadable
from flame.data.files.blocks import WholeFile, file_size, naming, open_file
from flame.errors import first_line

LARGEST_BLOCK = 4 * 2**20
SMALLEST_BLOCK = 64 * 2**10
"""Bounds of a block's bytes. A block reads beyond its end to the end of its last line."""


@dataclass(frozen=True)
class Lines:
    """The lines of a file that begin in `begin` … `begin + weight`, in bytes."""

    file: str
    begin: int
    weight: int

    rows = None

    @property
    def place(self) -> tuple[str, int]:
        return self.file, self.begin

    def cells(self, text_key: str, start: int) -> Iterator[Any]:
        with naming(self.file), open_file(self.file) as stream:
            for line in islice(self._lines(stream), start, None):
                yield cell(line, text_key)

    def _lines(self, stream: Any) -> Iterator[bytes]:
        position = self.begin
        if position > 0:
            stream.seek(position - 1)
            position += len(stream.readline()) - 1
        while position < self.begin + self.weight and (line := stream.readline()):
            position += len(line)
            if line.strip():
                yield line


@dataclass(frozen=True)
class Compressed(WholeFile):
    """All lines of a gzip file; to reach a row, those before it are read."""

    def cells(self, text_key: str, start: int) -> Iterator[Any]:
        with naming(self.file), open_file(self.file) as raw, gzip.open(raw) as stream:
            lines = (line for line in stream if line.strip())
            try:
                for line in islice(lines, start, None):
                    yield cell(line, text_key)
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                yield Unreadable(f"the rest of {self.file} is damaged: {first_line(error)}")


def line_blocks(files: list[str], parts: int) -> list[Lines | Compressed]:
    """Return the blocks of JSON lines files, in order; `parts` is how many are wanted at least.

    Raises:
        UserError: a file cannot be read.
    """
    sizes = {file: file_size(file) for file in files}
    size = min(max(sum(sizes.values()) // parts, SMALLEST_BLOCK), LARGEST_BLOCK)
    blocks: list[Lines | Compressed] = []
    for file, total in sizes.items():
        if file.lower().endswith(".gz"):
            blocks.append(Compressed(file, total))
        else:
            blocks += [Lines(file, at, min(size, total - at)) for at in range(0, total, size)]
    return blocks


def cell(line: bytes, text_key: str) -> Any:
    """Return the text column of a row of JSON, `Unreadable` where it has none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Unreadable(f"it is not JSON: {first_line(error)}")
    return cell_of(row, text_key)


def cell_of(row: Any, text_key: str) -> Any:
    """Return the text column of a row, `Unreadable` where it has none."""
    if isinstance(row, dict) and text_key in row:
        return row[text_key]
    columns = f"one of {', '.join(list(row)[:8])}" if isinstance(row, dict) and row else "its name"
    return Unreadable(f"a row has no column {text_key!r}: set data.text_key to {columns}")
