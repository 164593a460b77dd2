"""The page docs/support.md: which families, spaces and methods go together.

`python -m pruning.support > docs/support.md` writes it, from the adapters and methods themselves.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

from pruning.adapters import ADAPTERS, PRUNED, TIED, TIED_KINDS
from pruning.adapters.interface import Adapter
from pruning.methods import METHODS
from pruning.planning.applicable import methods_for
from pruning.planning.budgets import SQUARE
from pruning.spaces import NOUNS, Kind, Space

SPACES: dict[str, tuple[Kind, ...]] = {
    "key": ("key",),
    "value": ("value",),
    "head": ("head",),
    "value-head": ("value-head",),
    SQUARE: ("key", "value"),
}
"""What `--space` takes, with the kinds of spaces that it prunes."""

TITLES = {**{str(kind): noun for kind, noun in NOUNS.items()}, SQUARE: SQUARE}


class Cell(NamedTuple):
    """A claim of the page: `--space` and `--method` prune a model of the family."""

    family: str
    space: str
    method: str


def cells() -> list[Cell]:
    """Every claim that the page makes, each of which a test tries on a real model."""
    return [
        Cell(name, space, method)
        for name, adapter in _prunable().items()
        for space in SPACES
        for method in _choosing_in(adapter, space)
    ]


def page() -> str:
    """The page as Markdown."""
    return f"""# What can be pruned

Made by `python -m pruning.support` from the adapters and methods; a test holds this page to them.

## Families

A row is a `model_type`. The columns say which of its spaces can be pruned, by `--space` {_flags()},
and what comes out when `--allocate` gives heads widths of their own: a class of this project, which
`import flame.register` makes known to transformers, or with `--pad` the stock class, with channels
of zeros. Value heads can go where each key head serves several: the same number from every key
head's group, by the key that the column names; `--allocate` leaves them alike. Square is key and
value channels at one width. For each family, space and method a test prunes a small model, and
loads the result in its stock class; that of `glm5_next_text` is transformers' text model with a
head of ours, and what is pruned of it lies in the whole `glm5_next` as well.

{_families()}

## Methods

A row is what `--method` takes, a column a space that it chooses in.

{_methods()}

## Refused by name

{_refusals()}
"""


def _families() -> str:
    header = ["family", *TITLES.values(), "shared widths (`--allocate`)"]
    rows = [
        [f"`{name}`", *(_support(adapter, space) for space in SPACES), _shared_form(adapter)]
        for name, adapter in _prunable().items()
    ]
    return _table(header, rows)


def _flags() -> str:
    """How `--space` calls the columns."""
    return _names(SPACES)


def _methods() -> str:
    rows = [
        [f"`{name}`", *("yes" if name in _choosing(space) else "" for space in SPACES)]
        for name in METHODS
    ]
    return _table(["method", *TITLES.values()], rows)


def _refusals() -> str:
    tied = [f"`{family}` ({reason})" for family, reason in TIED.items()]
    kinds = [
        f"{NOUNS[kind]} of `{family}` ({reason})" for (family, kind), reason in TIED_KINDS.items()
    ]
    return "\n".join(f"- {each}" for each in [*kinds, *tied])


def _support(adapter: Adapter, space: str) -> str:
    """Which of the methods that choose in such a space do so in this family."""
    able = _choosing_in(adapter, space)
    missing = [name for name in _choosing(space) if name not in able]
    if _half(adapter, space):
        return "in a square only"
    if not able:
        return "no"
    where = f" (`{adapter.value_heads_key}`)" if space == "value-head" else ""
    return f"yes{where}, but for {_names(missing)}" if missing else f"yes{where}"


def _choosing(space: str) -> list[str]:
    """The methods that choose in a space, in some family."""
    return [name for name, method in METHODS.items() if {*SPACES[space]} <= {*method.kinds}]


def _choosing_in(adapter: Adapter, space: str) -> list[str]:
    """The methods that choose in a space of this family; none if it has no such space."""
    spaces, kinds = _spaces(adapter), SPACES[space]
    if _half(adapter, space) or not kinds_of(adapter).issuperset(kinds):
        return []
    return [n for n in _choosing(space) if all(n in methods_for(kind, spaces) for kind in kinds)]


def _half(adapter: Adapter, space: str) -> bool:
    """Whether this is one of two kinds of channels that the family prunes to one width."""
    return bool(adapter.tied_width) and space in ("key", "value")


def _prunable() -> dict[str, Adapter]:
    return {name: adapter for name, adapter in ADAPTERS.items() if name not in PRUNED}


def kinds_of(adapter: Adapter) -> set[Kind]:
    """The kinds of spaces of the family's default config, with grouped value heads if it can."""
    return {space.kind for space in _spaces(adapter)}


def _spaces(adapter: Adapter) -> list[Space]:
    config: dict[str, Any] = {"model_type": adapter.model_type}
    spaces = adapter.spaces(config)
    if adapter.value_heads_key is None:
        return spaces
    heads = next(space.head_dim for space in spaces if space.kind == "head")
    return adapter.spaces({**config, adapter.value_heads_key: 2 * heads})


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
