"""What can be pruned how: the families, their spaces, and the methods that choose in each.

`python -m pruning.support` prints it as a table in Markdown, made from the adapters and methods.
"""

from collections.abc import Iterable
from typing import Any

from pruning.adapters import ADAPTERS, PRUNED, TIED, TIED_KINDS
from pruning.adapters.interface import Adapter
from pruning.applicable import methods_for
from pruning.spaces import KINDS, Kind, Space

NOUNS: dict[Kind, str] = {"key": "key channels", "value": "value channels", "head": "heads"}


def table() -> str:
    """The support table: a row for each family and each kind of space."""
    header = ["family", "space", "methods", "shared widths (`--allocate`)"]
    lines = [_row(header), _row(["---"] * len(header))]
    for family, adapter in ADAPTERS.items():
        if family not in PRUNED:
            lines += [_row([f"`{family}`", NOUNS[k], *_support(adapter, k)]) for k in KINDS]
    tied = [f"`{family}`: {reason}" for family, reason in TIED.items()]
    return "\n".join([*lines, "", f"Refused by name: {'; '.join(tied)}."])


def _support(adapter: Adapter, kind: Kind) -> list[str]:
    """Methods and form of shared widths, or why there are none."""
    if kind not in kinds_of(adapter):
        reason = TIED_KINDS.get((adapter.model_type, kind), "the family has no such space")
        return [f"none: {reason}", ""]
    return [
        _names(methods_for(kind, _spaces(adapter))),
        "own class or `--pad`" if _has_slim_class(adapter) else "`--pad`",
    ]


def kinds_of(adapter: Adapter) -> set[Kind]:
    """The kinds of spaces of the family's default config."""
    return {space.kind for space in _spaces(adapter)}


def _spaces(adapter: Adapter) -> list[Space]:
    config: dict[str, Any] = {"model_type": adapter.model_type}
    return adapter.spaces(config)


def _has_slim_class(adapter: Adapter) -> bool:
    return f"slim_{adapter.model_type}" in PRUNED


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    print(table())
