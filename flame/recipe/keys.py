"""The keys of a recipe: filling sections from tables, and checking each value.

A value is checked against the annotation and the bounds that its key declares. Numbers must be
finite and texts free of control characters, and a whole number may stand for a number.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, get_type_hints

from flame.errors import UserError
from flame.options.declaration import Declaration, declaration
from flame.recipe.sections import Recipe
from flame.storage.shape import check_shape

LONGEST = 4096
"""Most bytes of a text, as of a path."""

LONGEST_PART = 255
"""Most bytes between the slashes of a text, as of a file's name."""


def fill(recipe: Recipe, tables: Mapping[str, Any]) -> dict[str, Any]:
    """Set the keys of `recipe` from the tables of a TOML file.

    Returns:
        The values of unknown keys, by `section.key`: they may be torchtitan's (`flame.config`).

    Raises:
        UserError: a value is of another type than its key, or out of bounds.
    """
    unknown: dict[str, Any] = {}
    for name, values in tables.items():
        if name in sections():
            unknown |= fill_section(getattr(recipe, name), name, values)
        else:
            unknown |= {f"{name}.{key}": value for key, value in values.items()} or {name: {}}
    return unknown


def fill_section(section: Any, name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """As `fill`, for the section called `name`."""
    unknown: dict[str, Any] = {}
    for key, value in values.items():
        if key in keys_of(type(section)):
            setattr(section, key, checked(type(section), name, key, value))
        else:
            unknown[f"{name}.{key}"] = value
    return unknown


def check_values(recipe: Any) -> None:
    """Raise UserError for the first value that its key does not take.

    Args:
        recipe: a `Recipe`, or a job that has its sections.
    """
    for name, of in sections().items():
        for key in keys_of(of):
            if (value := getattr(getattr(recipe, name), key)) is not None:
                checked(of, name, key, value)


def checked(of: type, section: str, key: str, value: Any) -> Any:
    """Return the value of a key in section class `of`; raise UserError if the key takes no such."""
    name, kind, declared = (
        f"recipe key {section}.{key}",
        get_type_hints(of)[key],
        declared_by(of, key),
    )
    if type(value) is int and kind in (float, float | None):
        value = _as_float(value)
    try:
        check_shape(value, kind, name)
    except ValueError as error:
        raise UserError(str(error)) from error
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, str):
            _check_text(name, item)
        elif isinstance(item, int | float) and not declared.allows(item):
            noun = "a number" if isinstance(item, float) else "a whole number"
            raise UserError(f"{name} is {item!r}: it takes {noun}{declared.bounds()}")
    return value


def sections() -> dict[str, type]:
    """Return the class of each section by its name."""
    return get_type_hints(Recipe)


def declared_by(of: type, key: str) -> Declaration:
    """Return what the key of a section declares: bounds and the line about it."""
    (found,) = [each for each in dataclasses.fields(of) if each.name == key]
    declared = declaration(found)
    assert declared is not None, f"{of.__name__}.{key} is not declared by option()"
    return declared


def keys_of(of: type) -> list[str]:
    """Return the names of the keys in a section class."""
    return [each.name for each in dataclasses.fields(of)]


def all_keys() -> list[str]:
    """Return every `section.key`."""
    return [f"{name}.{key}" for name, of in sections().items() for key in keys_of(of)]


def unknown_key(name: str) -> UserError:
    """Return the error for a key that does not exist, with the nearest that does."""
    section, _, key = name.partition(".")
    known = sections()
    if section not in known:
        near = difflib.get_close_matches(section, known, n=1)
        hint = f"did you mean [{near[0]}]?" if near else f"choose from {', '.join(known)}"
        return UserError(f"recipe section [{section}] is unknown: {hint}")
    keys = keys_of(known[section])
    elsewhere = [other for other in all_keys() if other.partition(".")[2] == key]
    near = [f"{section}.{other}" for other in difflib.get_close_matches(key, keys, n=1)]
    if found := near or elsewhere:
        return UserError(f"recipe key {name} is unknown: did you mean {found[0]}?")
    return UserError(f"recipe key {name} is unknown: choose from {', '.join(keys)}")


def _as_float(value: int) -> float:
    try:
        return float(value)
    except OverflowError:
        return float("inf")


def _check_text(name: str, text: str) -> None:
    content = text.encode(errors="surrogatepass")
    if len(content) > LONGEST or max(map(len, content.split(b"/"))) > LONGEST_PART:
        raise UserError(
            f"{name} is {text[:40]!r}… of {len(content)} bytes: no file has such a name"
        )
    if any(byte < 32 for byte in content):
        raise UserError(f"{name} is {text[:40]!r}: it takes one line without control characters")
