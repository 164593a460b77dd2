"""What can be pruned how: the families, their spaces, and the methods that choose in each.

`python -m pruning.support` prints it as tables in Markdown, made from the adapters and methods.
"""

from collections.abc import Iterable
from typing import Any

from pruning.adapters import ADAPTERS, PRUNED, TIED, TIED_KINDS
from pruning.adapters.interface import Adapter
from pruning.methods import METHODS
from pruning.planning.applicable import methods_for
from pruning.spaces import KINDS, Kind, Space

NOUNS: dict[Kind, str] = {"key": "key channels", "value": "value channels", "head": "heads"}


def tables() -> str:
    """The support tables, families and methods, and what is refused."""
    return f"{_families()}\n\n{_methods()}\n\n{_refusals()}"


def _families() -> str:
    header = ["family", *NOUNS.values(), "shared widths (`--allocate`)"]
    rows = [
        [f"`{name}`", *(_support(adapter, kind) for kind in KINDS), _shared_form(adapter)]
        for name, adapter in _prunable().items()
    ]
    return _table(header, rows)


def _methods() -> str:
    rows = [
        [f"`{name}`", *("yes" if kind in method.kinds else "" for kind in KINDS)]
        for name, method in METHODS.items()
    ]
    return _table(["method", *NOUNS.values()], rows)


def _refusals() -> str:
    tied = [f"`{family}` ({reason})" for family, reason in TIED.items()]
    kinds = [
        f"{NOUNS[kind]} of `{family}` ({reason})" for (family, kind), reason in TIED_KINDS.items()
    ]
    return f"Refused by name: {'; '.join([*kinds, *tied])}."


def _support(adapter: Adapter, kind: Kind) -> str:
    """Which of the methods that choose in such spaces do so in this family."""
    if kind not in kinds_of(adapter):
        return "no"
    choosing = [name for name, method in METHODS.items() if kind in method.kinds]
    missing = [name for name in choosing if name not in methods_for(kind, _spaces(adapter))]
    return f"yes, but for {_names(missing)}" if missing else "yes"


def _prunable() -> dict[str, Adapter]:
    return {name: adapter for name, adapter in ADAPTERS.items() if name not in PRUNED}


def kinds_of(adapter: Adapter) -> set[Kind]:
    """The kinds of spaces of the family's default config."""
    return {space.kind for space in _spaces(adapter)}


def _spaces(adapter: Adapter) -> list[Space]:
    config: dict[str, Any] = {"model_type": adapter.model_type}
    return adapter.spaces(config)


def _shared_form(adapter: Adapter) -> str:
    return "own class or `--pad`" if f"slim_{adapter.model_type}" in PRUNED else "`--pad`"


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _table(header: list[str], rows: Iterable[list[str]]) -> str:
    return "\n".join(map(_row, [header, ["---"] * len(header), *rows]))


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    print(tables())
