"""From a command line to a dataclass of options, and back."""

import argparse
import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from flame.errors import UserError
from flame.options.declaration import REQUIRED, declaration
from flame.options.entry import Entry, entries, entries_of_several

T = TypeVar("T")

OVERRIDE = re.compile(r"--[\w-]+\.[\w.-]+(=|$)")
"""A word such as `--training.steps` or `--training.steps=200`."""


def parse(of: type[T], program: str, argv: Sequence[str], others: Sequence[str] = ()) -> T:
    """An instance of the dataclass `of` from the words of a command line.

    Args:
        of: the dataclass of options.
        program: what messages call the program, such as `slimstate plan`.
        argv: the words, without the program's name.
        others: options of others that may have been meant, such as `--nproc`.

    Raises:
        UserError: a word is no option, a value cannot be read, or something is missing.
    """
    flags = [entry.flag for entry in entries(of)]
    _, rest = _take_overrides(of, argv)
    # Before anything else: a misspelt option looks like one that is missing.
    for word in rest:
        name = word.partition("=")[0]
        if name.startswith("--") and name not in flags:
            near = difflib.get_close_matches(name, [*flags, *others], n=1)
            hint = f": did you mean {near[0]}?" if near else ""
            _Parser(program).error(f"unrecognized arguments: {name}{hint}")
    found, unknown = parse_known(of, program, argv)
    if unknown:
        hint = ": lists are written with commas, as A,B" if _has_lists(of) else ""
        hint = _file_hint(of, unknown[0]) or hint
        _Parser(program).error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    return found


def parse_known(of: type[T], program: str, argv: Sequence[str]) -> tuple[T, list[str]]:
    """As `parse`, and the words that are no options of `of`, instead of an error for them."""
    overridden, rest = _take_overrides(of, argv)
    try:
        values, unknown = _parser(of, program).parse_known_args(rest)
    except UserError:
        # `--perplexity MODEL`: the word is the argument that is missing, not the option's value.
        bare = {entry.flag for entry in entries(of) if entry.declared.bare is not None}
        ordered = sorted(rest, key=lambda word: word in bare)
        if ordered == rest or not bare & set(rest):
            raise
        values, unknown = _parser(of, program).parse_known_args(ordered)
    return _built(of, vars(values), overridden), unknown


def _file_hint(of: type, word: str) -> str:
    """Return a hint at the option that takes a file such as `word`; empty for none."""
    suffix = Path(word).suffix
    takes = [entry.flag for entry in entries(of) if Path(entry.metavar).suffix == suffix]
    return f": did you mean {takes[0]} {word}?" if suffix and takes else ""


def _has_lists(of: type) -> bool:
    return any(entry.is_list and entry.declared.form == "option" for entry in entries(of))


def help_text(of: type, program: str, description: str, epilog: str = "") -> str:
    """The text of `--help`.

    Args:
        of: the dataclass of options.
        program: what the usage calls the program, such as `slimstate plan`.
        description: what stands above the options.
        epilog: what stands below them.
    """
    parser = _parser(of, program, add_help=True)
    parser.description, parser.epilog = description, epilog
    return parser.format_help()


def list_text(of: type, title: str) -> str:
    """The part of a `--help` that lists the options of a dataclass, under a heading."""
    return _parser(of, "", title).format_help().partition("\n\n")[2].rstrip()


def words(options: Any) -> list[str]:
    """The command line that gives an instance; what is at its default is left out.

    Values that their option's own `parse` made are written by `str`.
    """
    return _words(options, set())


def _words(options: Any, seen: set[str]) -> list[str]:
    kinds = {entry.name: entry for entry in entries(type(options))}
    found: list[str] = []
    for each in dataclasses.fields(options):
        declared, value = declaration(each), getattr(options, each.name)
        if declared is None or each.name in seen or value == each.default:
            continue
        seen.add(each.name)
        if declared.form == "group":
            found += _words(value, seen)
        elif declared.form == "options of":
            found += [word for name in value for word in _option_words(kinds[name], value[name])]
        elif declared.form == "option":
            found += _option_words(kinds[each.name], value)
        else:
            found += map(str, value) if isinstance(value, tuple) else [str(value)]
    return found


def _option_words(entry: Entry, value: Any) -> list[str]:
    return [entry.flag] if entry.kind is bool else [entry.flag, entry.write(value)]


class _Parser(argparse.ArgumentParser):
    """Takes no abbreviations, and raises a UserError instead of writing to stderr."""

    def error(self, message: str) -> NoReturn:
        about_value = message.startswith("argument ")
        hint = "" if about_value else f" ({self.prog} --help)"
        raise UserError(message.removeprefix("argument ") + hint)


def _parser(of: type, program: str, title: str = "", add_help: bool = False) -> _Parser:
    parser = _Parser(program, add_help=add_help, allow_abbrev=False)
    groups: dict[str, Any] = {"": parser}
    added: set[str] = set()
    for entry in entries(of, title):
        if entry.name not in added:
            added.add(entry.name)
            if entry.title not in groups:
                groups[entry.title] = parser.add_argument_group(entry.title)
            _add(groups[entry.title], entry)
    return parser


def _add(parser: Any, entry: Entry) -> None:
    declared, default = entry.declared, entry.shown_default
    text = (declared.help + (f" (default: {default})" if default else "")).replace("%", "%%")
    if entry.kind is bool:
        how: dict[str, Any] = {"action": "store_true", "default": entry.default}
    else:
        how = {"type": entry.read, "metavar": entry.metavar}
    if declared.form == "argument":
        parser.add_argument(entry.name, nargs="+" if entry.is_list else None, help=text, **how)
        return
    if declared.bare is not None:
        how |= {"nargs": "?", "const": declared.bare}
    if entry.default is REQUIRED:
        how["required"] = True
    else:
        how["default"] = entry.default
    # An override is here for the help alone: `_take_overrides` keeps its words from this parser.
    parser.add_argument(entry.flag, dest=entry.name, help=text, **how)


def _built(of: type[T], values: Mapping[str, Any], overridden: Sequence[str] = ()) -> T:
    found: dict[str, Any] = {}
    for each in dataclasses.fields(of):  # type: ignore[arg-type]
        declared = declaration(each)
        if declared is None:
            continue
        if declared.form == "group":
            kept = {name: value for name, value in values.items() if name not in declared.without}
            found[each.name] = _built(declared.classes[""], kept)
        elif declared.form == "options of":
            names = [entry.name for entry in entries_of_several(declared)]
            found[each.name] = {n: values[n] for n in names if values[n] is not None}
        elif declared.form == "overrides":
            found[each.name] = tuple(overridden)
        elif each.name in values:
            value = values[each.name]
            found[each.name] = tuple(value) if isinstance(value, list) else value
    return of(**found)


def _take_overrides(of: type, argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The `--section.key VALUE …` words of a command line, and the other words."""
    forms = {entry.declared.form for entry in entries(of)}
    limit = 1 if "argument" in forms else len(argv)
    taken: list[str] = []
    rest: list[str] = []
    room = 0
    for word in argv:
        if "overrides" in forms and OVERRIDE.match(word):
            taken.append(word)
            room = 0 if "=" in word else limit
        elif room and not word.startswith("--"):
            taken.append(word)
            room -= 1
        else:
            rest.append(word)
            room = 0
    return taken, rest
