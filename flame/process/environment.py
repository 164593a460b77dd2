"""Environment variables: those of this project, and setting some for a while."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

STORE_VARIABLE = "SLIMSTATE_STORE"
"""The file in which the processes of one node meet; the launcher sets it."""

DRY_RUN_VARIABLE = "SLIMSTATE_DRY_RUN"
"""Set while `--dry-run` checks a command line."""


def is_dry_run() -> bool:
    """Whether the checks run for `--dry-run`: they must run no code of others then."""
    return DRY_RUN_VARIABLE in os.environ


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables inside the `with` block, and put the earlier values back after it.

    A variable that was not set before is removed.
    """
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
