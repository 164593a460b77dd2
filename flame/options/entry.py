"""The options of a dataclass one by one: their names, and how each reads and writes its value."""

import argparse
import dataclasses
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from flame.options.declaration import REQUIRED, Declaration, declaration


@dataclass(frozen=True)
class Entry:
    """One option or argument of a command, as `entries` finds it."""

    name: str
    """The field's name."""
    declared: Declaration
    kind: Any
    """The field's type, without `| None`."""
    default: Any
    """The field's default; `REQUIRED` for none."""
    title: str
    """The heading in the help; empty for none."""

    @property
    def flag(self) -> str:
        """The word on the command line, such as `--seq-len`; of an argument its metavar."""
        if self.declared.form == "overrides":
            return "--section.key"
        return flag_of(self.name) if self.declared.form == "option" else self.metavar

    @property
    def metavar(self) -> str:
        """What stands for the value in the help; empty for a flag."""
        if self.kind is bool:
            return ""
        choices = f"{{{','.join(self.choices)}}}" if self.choices else self.name.upper()
        return self.declared.metavar or choices

    @property
    def choices(self) -> Sequence[str]:
        """The words that are allowed; empty for any."""
        is_literal = typing.get_origin(self.kind) is Literal
        return typing.get_args(self.kind) if is_literal else self.declared.choices

    @property
    def is_list(self) -> bool:
        return typing.get_origin(self.kind) is tuple

    @property
    def shown_default(self) -> str:
        """The default as it would be written on the command line; empty for none."""
        none = self.default is None or self.default in ("", ()) or self.default is REQUIRED
        return "" if none or self.kind is bool or self.declared.parse else self.write(self.default)

    def write(self, value: Any) -> str:
        """The word for a value; `read` takes it back, unless the field has its own `parse`."""
        return ",".join(map(str, value)) if self.is_list else str(value)

    def read(self, text: str) -> Any:
        """The value that a word stands for.

        Raises:
            argparse.ArgumentTypeError: the word stands for none.
        """
        if self.declared.parse is not None:
            try:
                return self.declared.parse(text)
            except ValueError as error:
                raise argparse.ArgumentTypeError(str(error)) from error
        if not self.is_list or self.declared.form == "argument":
            return self._read_one(text)
        parts = [part.strip() for part in text.split(",")] if text.strip() else []
        if not all(parts):
            raise argparse.ArgumentTypeError(f"{text!r} has an empty part: write it as A,B")
        values = tuple(map(self._read_one, parts))
        for value in values:
            if values.count(value) > 1:
                raise argparse.ArgumentTypeError(f"{text} names {value} twice: leave one out")
        return tuple(sorted(values)) if self._kind_of_one is int else values

    @property
    def _kind_of_one(self) -> Any:
        return typing.get_args(self.kind)[0] if self.is_list else self.kind

    def _read_one(self, text: str) -> Any:
        kind = self._kind_of_one
        if self.choices and text not in self.choices:
            known = ", ".join(self.choices)
            raise argparse.ArgumentTypeError(f"unknown {text!r}: choose from {known}")
        if kind not in (int, float):
            return Path(text) if kind is Path else text
        noun = "a whole number" if kind is int else "a number"
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not self.declared.allows(value):
            given = text or "''"
            raise argparse.ArgumentTypeError(f"{given} is not {noun}{self.declared.bounds()}")
        return value


def entries(of: Any, title: str = "", without: Sequence[str] = ()) -> Iterator[Entry]:
    """The options and arguments of a dataclass, those of its groups included, in their order.

    Args:
        of: the dataclass.
        title: the heading of those that are in no group with a heading of its own.
        without: fields to leave out.
    """
    kinds = typing.get_type_hints(of)
    for found in dataclasses.fields(of):
        declared = declaration(found)
        if declared is None or found.name in without:
            continue
        if declared.form == "group":
            yield from entries(declared.classes[""], declared.help or title, declared.without)
        elif declared.form == "options of":
            yield from entries_of_several(declared, title)
        else:
            kind = _without_none(kinds[found.name])
            yield Entry(found.name, declared, kind, found.default, title)


def entries_of_several(several: Declaration, title: str = "") -> Iterator[Entry]:
    """Each option of the dataclasses that an `options_of` declares once; the help says whose it is.

    The default is None, whatever the class says, so that only options which are given have a value.
    """
    first: dict[str, Entry] = {}
    owners: dict[str, list[str]] = {}
    for name, of in several.classes.items():
        for entry in entries(of, title, several.without):
            first.setdefault(entry.name, entry)
            owners.setdefault(entry.name, []).append(name)
    for name, entry in first.items():
        default = f"; default: {entry.shown_default}" if entry.shown_default else ""
        text = f"{entry.declared.help} ({', '.join(owners[name])}{default})"
        yield replace(entry, declared=replace(entry.declared, help=text), default=None)


def flag_of(name: str) -> str:
    """The option of a field: `seq_len` is `--seq-len`, `for_` is `--for`."""
    return f"--{name.rstrip('_').replace('_', '-')}"


def _without_none(annotation: Any) -> Any:
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        known = [kind for kind in typing.get_args(annotation) if kind is not types.NoneType]
        # Of several the field's own `parse` makes one.
        return known[0] if len(known) == 1 else Any
    return annotation
