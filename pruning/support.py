"""The page docs/support.md: which families, spaces and methods go together.

`python -m pruning.support > docs/support.md` writes it, from the adapters and methods themselves.
"""

from collections.abc import Iterable
from typing import Any

from pruning.adapters import ADAPTERS, PRUNED, TIED, TIED_KINDS
from pruning.adapters.interface import Adapter
from pruning.methods import METHODS
from pruning.planning.applicable import methods_for
from pruning.spaces import KINDS, NOUNS, Kind, Space


def page() -> str:
    """The page as Markdown."""
    return f"""# What can be pruned

Made by `python -m pruning.support` from the adapters and methods; a test holds this page to them.

## Families

A row is a `model_type`. The columns say which of its spaces can be pruned, and what comes out when
`--allocate` gives heads widths of their own: a class of this project, which `import flame.register`
makes known to transformers, or with `--pad` the stock class with channels of zeros.

{_families()}

## Methods

A row is what `--method` takes, a column a kind of space that it chooses in.

{_methods()}

## Refused by name

{_refusals()}
"""


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
    return "\n".join(f"- {each}" for each in [*kinds, *tied])


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
    print(page(), end="")
