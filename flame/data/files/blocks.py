"""A part of a data file that is read in one piece."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from flame.errors import UserError, first_line

HUB = "hf://"
"""How the address of a file on the hub begins; all others are local paths."""


class Block(Protocol):
    """A part of a file; blocks are equal where they name the same part."""

    @property
    def place(self) -> tuple[str, int]:
        """The file and where in it the block begins."""

    @property
    def weight(self) -> int:
        """How much text it holds: in rows where they are known, else in bytes."""

    @property
    def rows(self) -> int | None:
        """How many rows it has; None where only reading tells."""

    def cells(self, text_key: str, start: int) -> Iterator[Any]:
        """Yield the values of the text column from the block's row `start` on.

        What cannot be read comes as `Unreadable`. A block always gives the same number of values.
        """


@dataclass(frozen=True)
class WholeFile:
    """Base of blocks that are one file, in which rows cannot be counted without reading."""

    file: str
    weight: int

    rows = None

    @property
    def place(self) -> tuple[str, int]:
        """The file, from its beginning."""
        return self.file, 0


def open_file(file: str) -> Any:
    """Open a local file, or one on the hub, for reading bytes; raise OSError if it cannot be."""
    if not file.startswith(HUB):
        return open(file, "rb")
    from huggingface_hub import HfFileSystem

    # Nothing is read ahead: the readers ask for the ranges that they need.
    return HfFileSystem().open(file, "rb", cache_type="none")


def file_size(file: str) -> int:
    """Return the bytes of a file; raise `UserError` if it is not there."""
    with naming(file):
        if not file.startswith(HUB):
            return Path(file).stat().st_size
        from huggingface_hub import HfFileSystem

        return int(HfFileSystem().info(file)["size"])


@contextmanager
def naming(file: str) -> Iterator[None]:
    """Turn an OSError or ValueError of the block, which reads `file`, into a `UserError`."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"cannot read {file}: {reason}") from error
