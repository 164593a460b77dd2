"""The envelope of result files: what the JSON of every measuring command says of itself.

A result is an object with `kind`, the command that wrote it; `format`, the version of what it
holds; `versions` of the software; `command`, the command line; and what the kind holds.
"""

import shlex
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from flame.errors import UserError
from flame.options import words
from flame.process.atomic_output import replacing_file, writer_lock
from flame.process.output_checks import check_file_output
from flame.storage.json_file import read_object_if_any, write_object
from flame.versions import versions

FORMATS = {
    "eval": 1, "recall": 1, "bench": 1, "capacity": 1, "serve-check": 1, "analyze": 1, "sweep": 1,
    "demo": 1, "comparison": 1,
}  # fmt: skip
"""The version of what each kind of result holds."""


def command_line(name: str, options: Any) -> str:
    """Return the command line that gives a stage these options."""
    return shlex.join(["slimstate", name, *words(options)])


def enveloped(kind: str, command: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """Return `content` in the envelope of a kind in `FORMATS`."""
    head = {"kind": kind, "format": FORMATS[kind], "command": command, "versions": versions()}
    return {**head, **content}


@contextmanager
def measuring(path: Path | None, overwrite: bool = True, alone: bool = False) -> Iterator[None]:
    """Keep the result file `path` to this job while the block measures what goes into it.

    The first rank holds the lock. None is no file. Collective unless `alone`, for a process that
    measures while others of its job wait.

    Raises:
        UserError: another job measures into the file, or it exists and `overwrite` is false.
    """
    from flame.process.peers import on_first

    with ExitStack() as stack:

        def begin() -> None:
            if path is not None:
                stack.enter_context(writer_lock(path))
                check_file_output(path, overwrite)

        if alone:
            begin()
        else:
            on_first(begin)
        yield


def write_result(
    path: Path, result: Mapping[str, Any], overwrite: bool = True, locked: bool = False
) -> None:
    """Write a result, whole or not at all.

    Args:
        overwrite: replace an existing `path`; without it one raises UserError.
        locked: it is written within `measuring(path)`.
    """
    with replacing_file(path, overwrite, locked) as temporary:
        write_object(temporary, result, ensure_ascii=False)


def read_result(path: Path) -> dict[str, Any] | None:
    """Return the result in a file; None if the file cannot be read or holds none.

    Raises:
        UserError: a later version of this program wrote it.
    """
    content = read_object_if_any(path)
    known, found = FORMATS.get(str(content.get("kind"))), content.get("format")
    if known is None or not isinstance(found, int):
        return None
    if found > known:
        raise UserError(
            f"{path} has format {found}, this slimstate reads up to {known}: install a newer one"
        )
    return content
