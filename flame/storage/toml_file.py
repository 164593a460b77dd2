"""TOML files. Whatever is wrong with one becomes a single line that names the file."""

import re
import tomllib
from pathlib import Path
from typing import Any

from flame.errors import UserError, first_line
from flame.storage.bounded_file import check_depth, read_bounded

LARGEST = 2**20
"""Most bytes of a file."""

DEEPEST = 32
"""Most tables and lists that lie inside one another, and names in one dotted key."""

_NAME = r"[\w\"'-]"
_LONG_KEY = re.compile(rf"(?<!{_NAME})(?:{_NAME}+[ \t]*\.[ \t]*){{{DEEPEST}}}")


def read_toml(path: Path, what: str = "") -> dict[str, Any]:
    """Return the tables of a TOML file.

    Args:
        path: the file.
        what: what the file is, such as "recipe", for the message.

    Raises:
        UserError: the file is missing, unreadable or no regular file, passes a bound or is not
            TOML.
    """
    name = f"{what} {path}".strip()
    try:
        text = read_bounded(path, LARGEST, f"cannot read {name}: no such file").decode()
        # The parser takes time that grows with the square of a dotted key's length.
        if _LONG_KEY.search(text):
            raise ValueError(f"it has more than {DEEPEST} names in one dotted key")
        tables = tomllib.loads(text)
        check_depth(tables, DEEPEST)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} is not TOML: {first_line(error)}") from error
    return tables
