"""Small files of a stranger, read whole and within a bound."""

from collections.abc import Iterable
from pathlib import Path

from flame.errors import UserError
from flame.storage.input_file import opened


def read_bounded(path: Path, largest: int, missing: str = "") -> bytes:
    """Return the bytes of a regular file, which may have at most `largest`.

    Pipes and devices are refused without waiting for them.

    Args:
        path: the file; a link is followed.
        largest: the bound in bytes.
        missing: the whole message for a file that does not exist.

    Raises:
        UserError: the file is missing, unreadable, not a regular file or too large.
    """
    with opened(path, missing) as descriptor, open(descriptor, "rb", closefd=False) as stream:
        content = stream.read(largest + 1)
    if len(content) > largest:
        raise UserError(f"{path} has more than the {largest:,} bytes that are read of such a file")
    return content


def check_depth(value: object, deepest: int) -> None:
    """Raise ValueError if dicts and lists lie inside one another more than `deepest` times."""
    level = [value]
    for _ in range(deepest):
        inner = [item for outer in level for item in _inside(outer)]
        level = [item for item in inner if isinstance(item, (dict, list))]
        if not level:
            return
    raise ValueError(f"it nests values more than {deepest} times")


def _inside(value: object) -> Iterable[object]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()
