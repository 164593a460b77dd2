"""Parquet files, row group by row group.

A file's footer says how many rows each group has, so groups can be dealt out and any row found
without reading another. Footers are kept beside the `datasets` library's cache: each is read from
its file once, however many processes follow.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from flame.data.files.bad_rows import Unreadable
from flame.data.files.blocks import HUB, naming, open_file
from flame.errors import UserError, first_line

ROWS = 64
"""Rows made into Python strings at once."""

BUFFER = 2**20
"""Bytes read at once. A group is read as it is needed, not whole."""


@dataclass(frozen=True)
class RowGroup:
    """One row group of a parquet file."""

    file: str
    group: int
    weight: int

    @property
    def place(self) -> tuple[str, int]:
        return self.file, self.group

    @property
    def rows(self) -> int:
        return self.weight

    def cells(self, text_key: str, start: int) -> Iterator[Any]:
        """Yield the text column from row `start` on; what is damaged gives `Unreadable` rows."""
        given = start
        try:
            for values in self._batches(text_key, start):
                yield from values
                given += len(values)
        except (OSError, ValueError) as error:
            reason = f"row group {self.group} of {self.file} is damaged: {first_line(error)}"
            yield from [Unreadable(reason)] * (self.weight - given)

    def _batches(self, text_key: str, start: int) -> Iterator[list[Any]]:
        import pyarrow.parquet as pq

        metadata, passed = footer(self.file), 0
        with (
            open_file(self.file) as stream,
            pq.ParquetFile(stream, metadata=metadata, buffer_size=BUFFER) as parquet,
        ):
            batches = parquet.iter_batches(ROWS, row_groups=[self.group], columns=[text_key])
            for batch in batches:
                column = batch.column(0)
                if passed + len(column) > start:
                    yield _values(column.slice(max(start - passed, 0)))
                passed += len(column)


def row_groups(files: list[str], text_key: str) -> list[RowGroup]:
    """Return the row groups of parquet files, in order.

    Raises:
        UserError: a file cannot be read, or has no column `text_key` of text.
    """
    groups = []
    for file in files:
        metadata = footer(file)
        _check_column(file, metadata, text_key)
        rows = [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]
        groups += [RowGroup(file, g, count) for g, count in enumerate(rows) if count]
    return groups


def footer(file: str) -> Any:
    """Return a file's `pyarrow.parquet.FileMetaData`; raise `UserError` if it has none."""
    import pyarrow.parquet as pq

    kept = _kept_footer(file)
    with suppress(OSError, ValueError):
        return _read_footer(kept)
    with naming(file), open_file(file) as stream:
        metadata = pq.read_metadata(stream)
    with suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        own = kept.with_name(f"{kept.name}.{os.getpid()}")
        metadata.write_metadata_file(str(own))
        own.replace(kept)
    return metadata


@lru_cache(maxsize=16)
def _read_footer(kept: Path) -> Any:
    import pyarrow.parquet as pq

    return pq.read_metadata(kept)


def _kept_footer(file: str) -> Path:
    """Return where a file's footer is kept, by its path, size and time of change."""
    import datasets

    digest = hashlib.sha256(_version(file).encode(errors="surrogateescape")).hexdigest()[:32]
    return Path(datasets.config.HF_DATASETS_CACHE) / "slimstate-footers" / f"{digest}.parquet"


def _version(file: str) -> str:
    if file.startswith(HUB):
        # The address names the revision.
        return file
    with naming(file):
        found = Path(file).stat()
    return f"{file} {found.st_size} {found.st_mtime_ns}"


def _check_column(file: str, metadata: Any, text_key: str) -> None:
    import pyarrow as pa

    with naming(file):
        schema = metadata.schema.to_arrow_schema()
    if text_key not in schema.names:
        columns = ", ".join(schema.names)
        raise UserError(f"{file} has no column {text_key!r}: set data.text_key to one of {columns}")
    kind = schema.field(text_key).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    texts = (
        pa.types.is_string,
        pa.types.is_large_string,
        pa.types.is_string_view,
        pa.types.is_null,
    )
    if not any(is_text(kind) for is_text in texts):
        raise UserError(f"column {text_key!r} of {file} holds {kind}, not text: set data.text_key")


def _values(column: Any) -> list[Any]:
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_value(cell) for cell in column]


def _value(cell: Any) -> Any:
    try:
        return cell.as_py()
    except UnicodeDecodeError:
        return Unreadable("its text is not UTF-8")
