"""The command line of a sweep, which may name a file that has its models and options."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from flame import options as declared
from flame.errors import UserError
from launch.sweeping.models import read_sweep_file
from launch.sweeping.options import Options

FLAG = "--config"
NOT_KEYS = ("config",)


def read_options(argv: Sequence[str], program: str, others: Sequence[str] = ()) -> Options:
    """Return the options of a command line, with those of the file that `--config` names.

    Raises:
        UserError: a word or the file cannot be read.
    """
    path, rest = _without_config(argv)
    if path is None:
        return declared.parse(Options, program, argv, others)
    entries = [
        entry
        for entry in declared.entries(Options)
        if entry.declared.form == "option" and entry.name not in NOT_KEYS
    ]
    file = read_sweep_file(path, entries)
    # The first model stands for all of them: each gets a copy of the options with its own.
    words = [file.models[0].model, file.out, *file.words, *rest]
    found = declared.parse(Options, program, words, others)
    return replace(found, config=path, models=file.models, given=tuple(argv))


def _without_config(argv: Sequence[str]) -> tuple[Path | None, list[str]]:
    """The value of `--config`, and the other words."""
    words = list(argv)
    for place, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name == FLAG:
            end = place + 1 if equals else place + 2
            if not equals and end > len(words):
                raise UserError(f"{FLAG}: expected one argument")
            return Path(value if equals else words[place + 1]), words[:place] + words[end:]
    return None, words
