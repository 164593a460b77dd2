"""Recipe keys on a command line: `--section.key VALUE …` or `--section.key=VALUE`.

A flag stands alone, as `--section.key` or `--section.no-key`, or has `true` or `false` after it. A
list is one word with commas, or several words. `none` unsets a key that may be unset.
"""

import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from flame.errors import UserError
from flame.recipe.keys import sections

CONFIG_FILE = "job.config_file"
"""The key that names the recipe itself, as in torchtitan."""

TRUTH = {"true": True, "false": False}


def recipe_path(arguments: Sequence[str]) -> Path | None:
    """Return the recipe that `--job.config_file` of a command line of `train` names, if any."""
    found = [values for name, values in _split(arguments) if name == CONFIG_FILE]
    return Path(" ".join(found[-1])) if found else None


def option_name(argument: str) -> str:
    """Return `section.key` of an argument `--section.key` or `--section.key=value`."""
    return argument.partition("=")[0].replace("-", "_").lstrip("_")


def overriding(arguments: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the tables that the words of a command line stand for; a later word wins.

    Values of unknown keys stay text, for `flame.config` to judge.

    Raises:
        UserError: a word is no override, or a value is of another type than its key.
    """
    tables: dict[str, dict[str, Any]] = {}
    for name, values in _split(arguments):
        section, _, key = name.partition(".")
        if name == CONFIG_FILE:
            continue
        kinds = get_type_hints(sections().get(section, object))
        if key.startswith("no_") and kinds.get(key[3:]) is bool and not values:
            key, values = key[3:], ["false"]
        kind = kinds.get(key)
        value = " ".join(values or ["true"]) if kind is None else _read(f"--{name}", kind, values)
        tables.setdefault(section, {})[key] = value
    return tables


def _split(arguments: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Return `section.key` and the words after it, for each override of a command line."""
    found: list[tuple[str, list[str]]] = []
    for word in arguments:
        if word.startswith("--"):
            _, equals, value = word.partition("=")
            found.append((option_name(word), [value] if equals else []))
        elif not found:
            raise UserError(f"unrecognized arguments: {word}")
        else:
            found[-1][1].append(word)
    return found


def _read(option: str, kind: Any, words: list[str]) -> Any:
    """Return the value of type `kind` that words stand for; bounds are checked elsewhere."""
    if get_origin(kind) is list:
        parts = words[0].split(",") if len(words) == 1 else words
        return [_read(option, get_args(kind)[0], [part.strip()]) for part in parts if part.strip()]
    if kind is bool:
        text = " ".join(words).lower() or "true"
        if text not in TRUTH:
            raise UserError(f"{option}: {text!r} is neither true nor false")
        return TRUTH[text]
    if len(words) != 1:
        many = f"{len(words)} values: it takes one" if words else "no value: it takes one"
        raise UserError(f"{option} has {many}")
    (word,) = words
    if isinstance(kind, types.UnionType):
        kind, none = get_args(kind)
        if word.lower() == "none":
            return None
    if kind not in (int, float):
        return word
    try:
        return kind(word)
    except ValueError:
        noun = "a whole number" if kind is int else "a number"
        raise UserError(f"{option}: {word} is not {noun}") from None
