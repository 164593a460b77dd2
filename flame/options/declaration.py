"""How a dataclass field declares that it is given on a command line.

The field's annotation says how a word is read: `str`, `int`, `float`, `Path`, `Literal` (its values
are the choices), `bool` (a flag without a value), `X | None` (as X), and `tuple[X, ...]` (X's with
commas between, none empty and none twice; whole numbers are sorted).
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

REQUIRED: Any = dataclasses.MISSING
"""The default of an option that must be given."""


@dataclass(frozen=True)
class Declaration:
    """What a field says of itself; the functions below make one."""

    form: Literal["option", "argument", "overrides", "group", "options of"]
    help: str = ""
    """One line for the help, which adds the default itself."""
    metavar: str | None = None
    """What stands for the value in the help."""
    least: float | None = None
    """The inclusive lower bound of a number, or of each number of a list."""
    most: float | None = None
    """The inclusive upper bound; a lower one must be given too."""
    above: float | None = None
    """The exclusive lower bound."""
    below: float | None = None
    """The exclusive upper bound; a lower one must be given too."""
    choices: Sequence[str] = ()
    """The words that are allowed, where the annotation is no `Literal`."""
    parse: Callable[[str], Any] | None = None
    """Reads the whole word instead of the annotation's reader; a ValueError or a UserError says why
    it cannot."""
    bare: Any = None
    """The value of the option without a word after it; None if it needs one. A word after it that
    the command's arguments cannot do without is an argument."""
    classes: Mapping[str, Any] = field(default_factory=dict)
    """The dataclasses of `options_of` by name; of a `group` its one class."""
    without: Sequence[str] = ()
    """Fields of `classes` that are no options here."""

    def allows(self, number: float) -> bool:
        """Whether a number lies within the bounds; NaN does not lie within any."""
        return (
            (self.least is None or number >= self.least)
            and (self.most is None or number <= self.most)
            and (self.above is None or number > self.above)
            and (self.below is None or number < self.below)
        )

    def bounds(self) -> str:
        """The bounds in words that follow `a number`; empty for none."""
        if self.below is not None and self.least is not None:
            return f" from {self.least} to below {self.below}"
        if self.below is not None:
            return f" between {self.above} and {self.below}"
        if self.above is not None:
            return f" above {self.above}" + (f", at most {self.most}" if self.most else "")
        if self.most is not None:
            return f" from {self.least} to {self.most}"
        return "" if self.least is None else f" of at least {self.least}"


def declaration(of: dataclasses.Field) -> Declaration | None:
    """What a field declares; None if it is not given on the command line."""
    return of.metadata.get("declared")


def option(default: Any, help: str, **how: Any) -> Any:
    """A dataclass field that is the option `--name` of a command line.

    Args:
        default: its value where the option is not given; `REQUIRED` if it must be. Each instance
            gets a list of its own.
        help: one line for the help, which adds the default itself.
        how: fields of `Declaration` from `metavar` to `bare`.
    """
    metadata = {"declared": Declaration("option", help, **how)}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def argument(metavar: str, help: str) -> Any:
    """A dataclass field that is a positional argument; one or more words if it is a tuple."""
    return field(metadata={"declared": Declaration("argument", help, metavar)})


def overrides(help: str) -> Any:
    """A dataclass field that takes all `--section.key VALUE` and `--section.key=VALUE` words.

    A key takes one value where the command has positional arguments, else all words up to the next
    option.
    """
    return field(default=(), metadata={"declared": Declaration("overrides", help, "VALUE")})


def group(of: type, title: str = "", without: Sequence[str] = ()) -> Any:
    """A dataclass field whose value is another dataclass of options.

    Groups may share an option, such as `--seed`: each then gets the same value.

    Args:
        of: the dataclass.
        title: the heading of its options in the help; empty to list them with those around.
        without: fields that are no options here and keep their defaults.
    """
    declared = Declaration("group", title, classes={"": of}, without=without)
    return field(default_factory=of, metadata={"declared": declared})


def options_of(classes: Mapping[str, Any], without: Sequence[str] = ()) -> Any:
    """A dataclass field that holds, by name, the given ones of the options of several dataclasses.

    Args:
        classes: dataclasses by the name under which the help says whose an option is.
        without: fields that are no options here.
    """
    declared = Declaration("options of", classes=classes, without=without)
    return field(default_factory=dict, metadata={"declared": declared})
