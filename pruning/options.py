"""Command-line options that the stages of this package share.

A method's hyper-parameters are options too: its dataclass fields say name, default and help.
"""

import argparse
import dataclasses
import types
import typing
from argparse import Namespace
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from flame.errors import UserError, first_line
from pruning.methods import METHODS, Method
from pruning.planning.budgets import (
    ALLOCATE,
    MULTIPLE_OF,
    Budget,
    parse_per_kind,
    parse_ratio,
    parse_width,
)

SEQUENCES = 16
"""Calibration sequences, as in arXiv 2602.04852."""
SEQ_LEN = 2048
"""Tokens a sequence where no recipe says otherwise."""
SEED = 42
LARGEST_SEED = 2**63 - 1
"""That random number generators take."""

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
        "--seed",
        type=whole(0, LARGEST_SEED),
        default=SEED,
        help="of everything random (default: %(default)s)",
    )


def data_options(values: Namespace) -> DataOptions:
    """What `add_data_options` and `add_seed_option` parsed."""
    names = [field.name for field in dataclasses.fields(DataOptions)]
    return DataOptions(**{name: getattr(values, name) for name in names})


def add_budget_options(parser: argparse.ArgumentParser) -> None:
    """`--ratio`, `--width` or `--state-bytes` and what goes with it, for `budget`."""
    add = parser.add_argument_group("budget (one of --ratio, --width, --state-bytes)").add_argument
    add("--ratio", help="part of the channels to remove, such as 0.5 or key=0.5,head=0.25")
    add("--width", help="channels a head to keep, such as 64 or key=64,value=32")
    add("--state-bytes", type=whole(1), metavar="N", help="most bytes of a sequence's state")
    add(
        "--space",
        default="key",
        metavar="KIND,KIND",
        help="what to prune: key, value (channels) or head (default: %(default)s)",
    )
    add(
        "--allocate",
        choices=ALLOCATE,
        default="uniform",
        help="share the channels by the method's scores between the heads of a layer or of the "
        "model (default: %(default)s)",
    )
    add_pad_option(parser)
    add("--multiple-of", type=whole(1), help=f"of the kept width (default: {MULTIPLE_OF})")
    add("--paper", action="store_true", help="as published: --multiple-of 1, and the method's")


def add_pad_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--pad",
        action="store_true",
        help="where heads differ, write a stock model, filled up with zeros to the largest width",
    )


def budget(values: Namespace) -> Budget:
    """What `add_budget_options` parsed; UserError if it is no budget."""
    if values.paper and values.multiple_of not in (None, 1):
        raise UserError(f"--paper means --multiple-of 1, not {values.multiple_of}: leave one out")
    default = 1 if values.paper else MULTIPLE_OF
    multiple_of = default if values.multiple_of is None else values.multiple_of
    given = [values.ratio, values.width, values.state_bytes]
    if sum(value is not None for value in given) != 1:
        raise UserError("give exactly one of --ratio, --width and --state-bytes")
    budget = Budget(
        ratio=None if values.ratio is None else parse_per_kind(values.ratio, parse_ratio),
        multiple_of=multiple_of,
        space=values.space,
        width=None if values.width is None else parse_per_kind(values.width, parse_width),
        state_bytes=values.state_bytes,
        allocate=values.allocate,
        pad=values.pad,
    )
    return replace(budget, space=",".join(budget.kinds))


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
        add(_flag(name), dest=name, help=text, **_reading(owner, first))


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
    chosen = {k: v for k, v in given.items() if k in own and v is not None}
    try:
        return METHODS[name](**_as_published(values, name, chosen))
    except ValueError as error:
        raise UserError(f"method {name}: {first_line(error)}") from error


def _as_published(values: Namespace, name: str, chosen: dict[str, Any]) -> dict[str, Any]:
    """`chosen` hyper-parameters and, with --paper, those of the method's paper."""
    published = getattr(METHODS[name], "paper", {}) if getattr(values, "paper", False) else {}
    for key, value in published.items():
        if chosen.get(key, value) != value:
            raise UserError(f"--paper means {_flag(key)} {value}, not {chosen[key]}: leave one out")
    return {**published, **chosen}


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """A converter for whole numbers from `least` to `most`."""

    def whole_number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least {least}")
        if most is not None and int(text) > most:
            raise argparse.ArgumentTypeError(f"{text} is more than {most}, the largest there is")
        return int(text)

    return whole_number


def _hyperparameters() -> dict[str, list[tuple[type[Method], dataclasses.Field]]]:
    """The fields of all methods by name, with the methods that have them."""
    found: dict[str, list[tuple[type[Method], dataclasses.Field]]] = {}
    for kind in METHODS.values():
        for field in dataclasses.fields(kind):
            found.setdefault(field.name, []).append((kind, field))
    return found


def _reading(owner: type[Method], field: dataclasses.Field) -> dict[str, Any]:
    """How argparse reads a field: as annotated, `int | None` as int, and bool as a flag."""
    annotation = typing.get_type_hints(owner)[field.name]
    if annotation is bool:
        return {"action": "store_true", "default": None}
    if isinstance(annotation, types.UnionType):
        annotation = next(t for t in typing.get_args(annotation) if t is not types.NoneType)
    return {"type": annotation}


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _flags(names: Iterable[str]) -> str:
    return ", ".join(_flag(name) for name in sorted(names)) or "none"
