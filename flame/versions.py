"""Which versions of the programs that results depend on are installed. Imports no torch."""

import importlib.metadata
from collections.abc import Sequence

PROGRAMS = ("slimstate", "torch", "transformers", "flash-linear-attention")
"""Distributions whose version a figure depends on."""


def versions(programs: Sequence[str] = PROGRAMS) -> dict[str, str]:
    """Return the version of each distribution that is installed; others are left out."""
    found = {}
    for name in programs:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
