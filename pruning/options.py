"""Command-line options that the stages of this package share.

A method's hyper-parameters are options too: its dataclass fields say name, default and help.
"""

import argparse
import dataclasses
import types
import typing
from argparse import Namespace
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

from flame.errors import UserError, first_line
from pruning.budgets import MULTIPLE_OF, parse_ratio
from pruning.choose import Budget
from pruning.methods import METHODS, Method

SEQUENCES = 16
"""Calibration sequences, as in arXiv 2602.04852."""
SEQ_LEN = 2048
"""Tokens a sequence where no recipe says otherwise."""
SEED = 42

MODEL_HELP = "run folder, step folder, Hugging Face folder or hub name"


@dataclass(frozen=True)
class DataOptions:
    """Which data a calibration reads, and how much of it."""

    data: str = ""
    """What the recipe's `data.dataset` takes; empty for the recipe's."""
    subset: str = ""
    split: str = ""
    text_key: str = ""
    tokenizer: str = ""
    """A folder or hub name; empty for the model's own."""
    sequences: int = SEQUENCES
    seq_len: int | None = None
    """Tokens a sequence; None for the recipe's."""
    seed: int = SEED
    """Of the order of the documents."""


class Parser(argparse.ArgumentParser):
    """Complains by a UserError, takes no abbreviations."""

    def __init__(self, command: str, description: str) -> None:
        super().__init__(prog=f"slimstate {command}", description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(message.removeprefix("argument "))


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """`--data` and what goes with it, for `data_options`."""
    add = parser.add_argument_group("calibration").add_argument
    add("--data", default="", help="hub name, file or folder (default: the run's recipe)")
    add("--subset", default="", help="configuration of a hub data set")
    add("--split", default="", help="split of the data set (default: train)")
    add("--text-key", default="", help="column that holds the text")
    add("--tokenizer", default="", help="folder or hub name (default: the model's own)")
    add("--sequences", type=whole(1), default=SEQUENCES, help="sequences (default: %(default)s)")
    add("--seq-len", type=whole(1), help=f"tokens each (default: the recipe's, or {SEQ_LEN})")


def add_seed_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--seed", type=whole(0), default=SEED, help="of everything random (default: %(default)s)"
    )


def data_options(values: Namespace) -> DataOptions:
    """What `add_data_options` and `add_seed_option` parsed."""
    names = [field.name for field in dataclasses.fields(DataOptions)]
    return DataOptions(**{name: getattr(values, name) for name in names})


def add_budget_options(parser: argparse.ArgumentParser) -> None:
    """`--ratio` and what goes with it, for `budget`."""
    add = parser.add_argument_group("budget").add_argument
    add("--ratio", required=True, help="part of the channels to remove, such as 0.5")
    add("--space", default="key", metavar="KIND", help="what to prune (default: %(default)s)")
    add("--multiple-of", type=whole(1), help=f"of the kept width (default: {MULTIPLE_OF})")
    add("--paper", action="store_true", help="the width of arXiv 2602.04852: --multiple-of 1")


def budget(values: Namespace) -> Budget:
    """What `add_budget_options` parsed; UserError if it is no budget."""
    if values.paper and values.multiple_of not in (None, 1):
        raise UserError(f"--paper means --multiple-of 1, not {values.multiple_of}: leave one out")
    default = 1 if values.paper else MULTIPLE_OF
    multiple_of = default if values.multiple_of is None else values.multiple_of
    return Budget(parse_ratio(values.ratio), multiple_of, values.space)


def add_method_options(parser: argparse.ArgumentParser) -> None:
    """`--method` and the hyper-parameters of every method, for `method`."""
    add = parser.add_argument_group("method").add_argument
    add("--method", required=True, metavar="NAME", help=f"one of {', '.join(METHODS)}")
    for name, fields in _hyperparameters().items():
        if name == "seed":
            continue
        (owner, first), *_ = fields
        of = ", ".join(method.name for method, _ in fields)
        text = f"{first.metadata.get('help', '')} ({of}; default: {first.default})"
        add(_flag(name), dest=name, type=_converter(owner, first), help=text)


def method(values: Namespace) -> Method:
    """The method that the command line asks for, with its hyper-parameters.

    Raises:
        UserError: there is no such method, it has no such option, or refuses the value.
    """
    name = values.method
    if name not in METHODS:
        raise UserError(f"unknown method {name!r}: choose from {', '.join(METHODS)}")
    given = {key: getattr(values, key) for key in _hyperparameters()}
    own = {field.name for field in dataclasses.fields(METHODS[name])}
    for key, value in given.items():
        if key not in own and key != "seed" and value is not None:
            raise UserError(f"{_flag(key)} is no option of {name}: it has {_flags(own)}")
    try:
        return METHODS[name](**{k: v for k, v in given.items() if k in own and v is not None})
    except ValueError as error:
        raise UserError(f"method {name}: {first_line(error)}") from error


def whole(least: int) -> Callable[[str], int]:
    """A converter for whole numbers of at least `least`."""

    def whole_number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least {least}")
        return int(text)

    return whole_number


def _hyperparameters() -> dict[str, list[tuple[type[Method], dataclasses.Field]]]:
    """The fields of all methods by name, with the methods that have them."""
    found: dict[str, list[tuple[type[Method], dataclasses.Field]]] = {}
    for kind in METHODS.values():
        for field in dataclasses.fields(kind):
            found.setdefault(field.name, []).append((kind, field))
    return found


def _converter(owner: type[Method], field: dataclasses.Field) -> Callable[[str], Any]:
    """int, float or str, as the field is annotated; `int | None` takes an int."""
    annotation = typing.get_type_hints(owner)[field.name]
    if isinstance(annotation, types.UnionType):
        annotation = next(t for t in typing.get_args(annotation) if t is not types.NoneType)
    return annotation


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _flags(names: Iterable[str]) -> str:
    return ", ".join(_flag(name) for name in sorted(names)) or "none"
