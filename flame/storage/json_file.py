"""JSON files. Whatever is wrong with one becomes a single line that names the file.

Size, number of values and depth are bounded before anything else sees the content, so that a file
of a stranger cannot take the memory or the stack.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flame.errors import UserError, first_line
from flame.storage.bounded_file import check_depth, read_bounded
from flame.storage.shape import check_shape

LARGEST = 32 * 2**20
"""Most bytes of a file; the index of a model of 60,000 tensors has 6 MB."""

MOST_VALUES = 4_000_000
"""Most commas and brackets, so that values take at most some 256 MiB."""

DEEPEST = 64
"""Most objects and lists that lie inside one another."""

LONGEST_NUMBER = 40
"""Most digits of a whole number; those of 128 bits have 39."""


def read_object(
    path: Path, missing: str = "", shape: Any = None, largest: int = LARGEST, **hooks: Any
) -> dict[str, Any]:
    """Return the JSON object that a file holds.

    Args:
        path: the file.
        missing: the whole message for a file that does not exist.
        shape: a `TypedDict` with the keys and types that the object must have
            (`flame.storage.shape`); None for any.
        largest: most bytes that the file may have.
        hooks: options of `json.loads`; a ValueError that a hook raises is quoted in the message.

    Raises:
        UserError: the file is missing, unreadable or no regular file, passes a bound, is not JSON,
            or holds something else than `shape`.
    """
    content = read_bounded(Path(path), largest, missing)
    try:
        value = parse(content, **hooks)
        if not isinstance(value, dict):
            raise UserError(f"{path} is not a JSON object")
        if shape is not None:
            check_shape(value, shape)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {first_line(error)}") from error
    except ValueError as error:
        raise UserError(f"{path}: {first_line(error)}") from error
    return value


def parse(content: bytes, **hooks: Any) -> Any:
    """Return the value of a JSON text within the bounds of this module.

    Raises:
        ValueError: the text passes a bound, is not JSON or holds half a character (a lone
            surrogate, which cannot be printed or written).
        RecursionError: it is far too deep.
    """
    if sum(map(content.count, (b",", b"[", b"{"))) > MOST_VALUES:
        raise ValueError(f"it holds more than {MOST_VALUES:,} values")
    value = json.loads(content, **{"parse_int": _integer, **hooks})
    check_depth(value, DEEPEST)
    if re.search(rb"\\u[dD][89a-fA-F]", content):
        _check_characters(value)
    return value


def read_object_if_any(path: Path) -> dict[str, Any]:
    """Return the JSON object that a file holds; an empty one where `read_object` would raise."""
    try:
        return read_object(path)
    except UserError:
        return {}


def write_object(path: Path, content: Mapping[str, Any], **options: Any) -> None:
    """Write `content` as indented JSON; `options` are those of `json.dumps`."""
    path.write_text(json.dumps(content, indent=2, **options) + "\n")


def _integer(text: str) -> int:
    if len(text) > LONGEST_NUMBER:
        raise ValueError(f"it holds a number of {len(text)} digits")
    return int(text)


def _check_characters(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        raise ValueError("it holds half a character (a lone surrogate)") from None
