"""Files that are read whole: JSON that is not in lines, and text."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from flame.data.files.bad_rows import Unreadable
from flame.data.files.blocks import WholeFile, file_size, naming, open_file
from flame.data.files.lines import cell, cell_of

TEXT_FILES = 64
"""Text files in a block."""


@dataclass(frozen=True)
class JsonFile(WholeFile):
    """A `.json` file: a list of rows, one row, or rows in lines."""

    def cells(self, text_key: str, start: int) -> Iterator[Any]:
        with naming(self.file), open_file(self.file) as stream:
            content = stream.read()
        try:
            rows = json.loads(content)
        except (ValueError, RecursionError):
            lines = (line for line in content.splitlines() if line.strip())
            yield from (cell(line, text_key) for line in islice(lines, start, None))
            return
        for row in (rows if isinstance(rows, list) else [rows])[start:]:
            yield cell_of(row, text_key)


@dataclass(frozen=True)
class TextFiles:
    """Text files, each of which is one document."""

    files: tuple[str, ...]

    rows = None

    @property
    def place(self) -> tuple[str, int]:
        return self.files[0], 0

    @property
    def weight(self) -> int:
        return sum(map(file_size, self.files))

    def cells(self, text_key: str, start: int) -> Iterator[Any]:
        for file in self.files[start:]:
            with naming(file), open_file(file) as stream:
                content = stream.read()
            try:
                yield content.decode()
            except UnicodeDecodeError as error:
                yield Unreadable(f"{file} is not UTF-8: {error}")


def json_files(files: list[str]) -> list[JsonFile]:
    """Return a block for each JSON file; raise `UserError` if one cannot be read."""
    return [JsonFile(file, file_size(file)) for file in files]


def text_files(files: list[str], parts: int) -> list[TextFiles]:
    """Return blocks of text files, in order; `parts` is how many are wanted at least."""
    size = min(max(len(files) // parts, 1), TEXT_FILES)
    return [TextFiles(tuple(files[at : at + size])) for at in range(0, len(files), size)]
