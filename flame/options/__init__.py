"""Command-line options that are declared once, as the fields of a frozen dataclass.

    @dataclass(frozen=True)
    class Options:
        model: str = argument("MODEL", "run folder or hub name")
        steps: int = option(100, "training steps", least=1)
        data: DataOptions = group(DataOptions, "data")

`parse` makes an instance from a command line, `words` a command line from an instance, `help_text`
the help, and `entries` lists what there is.
"""

from flame.options.command_line import help_text, list_text, parse, parse_known, words
from flame.options.declaration import REQUIRED, argument, group, option, options_of, overrides
from flame.options.entry import Entry, entries, flag_of

__all__ = [
    "REQUIRED",
    "Entry",
    "argument",
    "entries",
    "flag_of",
    "group",
    "help_text",
    "list_text",
    "option",
    "options_of",
    "overrides",
    "parse",
    "parse_known",
    "words",
]
