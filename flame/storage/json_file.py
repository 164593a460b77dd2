"""JSON files. What is wrong with one becomes a single line that names the file."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flame.errors import UserError, first_line


def read_object(path: Path, missing: str = "", **hooks: Any) -> dict[str, Any]:
    """Return the JSON object that a file holds.

    Args:
        path: the file.
        missing: the whole message for a file that does not exist.
        hooks: options of `json.loads`; a ValueError that a hook raises is quoted in the message.

    Raises:
        UserError: the file is missing or unreadable, is not JSON, or holds another value.
    """
    try:
        content = json.loads(Path(path).read_bytes(), **hooks)
    except OSError as error:
        if missing and isinstance(error, FileNotFoundError):
            raise UserError(missing) from None
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {first_line(error)}") from error
    except ValueError as error:
        raise UserError(f"{path}: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object")
    return content


def read_object_if_any(path: Path) -> dict[str, Any]:
    """Return the JSON object that a file holds; an empty one where `read_object` would raise."""
    try:
        return read_object(path)
    except UserError:
        return {}


def write_object(path: Path, content: Mapping[str, Any], **options: Any) -> None:
    """Write `content` as indented JSON; `options` are those of `json.dumps`."""
    path.write_text(json.dumps(content, indent=2, **options) + "\n")
