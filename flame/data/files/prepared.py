"""All documents of some files as one set that can be indexed, kept on disk by `datasets`."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from flame.data.documents import reading
from flame.data.files.bad_rows import BadRows
from flame.data.files.blocks import Block

VERSION = 1
"""Changes when the same files give other documents."""


def prepared_rows(blocks: Sequence[Block], text_key: str, bad_rows: BadRows) -> Any:
    """Return a `datasets.Dataset` with the column `text`, which holds the documents of `blocks`.

    A prepared set is used again until a file changes; a lock makes processes that prepare the same
    set wait for each other. Rows that are no text are empty documents.

    Raises:
        UserError: a file cannot be read, or too many rows are no text.
    """
    from datasets import Dataset, Features, Value

    def rows() -> Iterator[dict[str, str]]:
        for block in blocks:
            for cell in block.cells(text_key, 0):
                yield {"text": bad_rows.text(cell)}
        bad_rows.finish()
        bad_rows.report()

    with reading(bad_rows.name):
        return Dataset.from_generator(
            rows,
            features=Features({"text": Value("large_string")}),
            fingerprint=_fingerprint(blocks, text_key, bad_rows.limit),
        )


def _fingerprint(blocks: Sequence[Block], text_key: str, limit: int) -> str:
    lines = [f"{VERSION} {text_key} {limit}"]
    for block in blocks:
        files = getattr(block, "files", (block.place[0],))
        changed = [Path(file).stat().st_mtime_ns if Path(file).exists() else 0 for file in files]
        lines.append(f"{files} {block.place} {block.weight} {changed}")
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()[:32]
