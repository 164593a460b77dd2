"""Options declared as dataclass fields: what a command line makes of them, and back."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from flame.errors import UserError
from flame.options import (
    REQUIRED,
    argument,
    entries,
    group,
    help_text,
    option,
    options_of,
    overrides,
    parse,
    parse_known,
    words,
)


@dataclass(frozen=True)
class Data:
    data: str = option("", "a text")
    seq_len: int | None = option(None, "tokens", least=1)
    seed: int = option(7, "of the order", least=0, most=99)


@dataclass(frozen=True)
class Circle:
    radius: float = option(1.5, "its radius", above=0)
    seed: int = option(0, "not here")


@dataclass(frozen=True)
class Square:
    radius: float = option(2.5, "of the circle in it")
    is_filled: bool = option(False, "whether it is filled")


@dataclass(frozen=True)
class Options:
    model: str = argument("MODEL", "a model")
    others: tuple[Path, ...] = argument("OTHER", "other files")
    to: Literal["hf", "dcp"] = option(REQUIRED, "a format")
    out: Path | None = option(None, "a file", metavar="FILE")
    ratio: float = option(0.5, "50% is half", above=0, below=1)
    names: tuple[str, ...] = option(("a", "b"), "names", choices=("a", "b", "c"))
    sizes: tuple[int, ...] = option((), "sizes", least=1)
    text: str | None = option(None, "a text or the usual one", bare="")
    pair: tuple[int, int] = option((1, 2), "X:Y", parse=lambda text: _pair(text))
    pad: bool = option(False, "fill up")
    seed: int = option(7, "of everything", least=0, most=99)
    data: Data = group(Data, "data", without=("data",))
    shapes: Mapping[str, Any] = options_of({"circle": Circle, "square": Square}, without=("seed",))
    keys: tuple[str, ...] = overrides("keys of a recipe")


def _pair(text: str) -> tuple[int, int]:
    left, _, right = text.partition(":")
    return int(left), int(right)


def read(line: str) -> Options:
    return parse(Options, "slimstate toy", line.split())


def test_defaults_and_annotations_say_how_words_are_read() -> None:
    plain = read("m x y --to hf")
    assert plain == Options("m", (Path("x"), Path("y")), "hf")
    line = "m x --to dcp --out f --ratio 0.25 --names c,a --sizes 8,2 --text --pair 3:4 --pad"
    assert read(line) == Options(
        "m", (Path("x"),), "dcp", Path("f"), 0.25, ("c", "a"), (2, 8), "", (3, 4), True
    )
    assert read("m x --to hf --text words").text == "words"


def test_groups_share_an_option_and_keep_what_is_no_option() -> None:
    found = read("m x --to hf --seed 3 --seq-len 9")
    assert (found.seed, found.data) == (3, Data("", 9, 3))
    with pytest.raises(UserError, match="unrecognized arguments: --data"):
        read("m x --to hf --data d")


def test_of_several_classes_the_given_options_are_kept() -> None:
    assert read("m x --to hf").shapes == {}
    assert read("m x --to hf --radius 4 --is-filled").shapes == {"radius": 4.0, "is_filled": True}
    with pytest.raises(UserError, match="--radius: 0 is not a number above 0"):
        read("m x --to hf --radius 0")
    (radius,) = [entry for entry in entries(Options) if entry.name == "radius"]
    assert radius.declared.help == "its radius (circle, square; default: 1.5)"


def test_an_override_takes_one_value_beside_arguments_and_else_all() -> None:
    assert read("--a.b 1 m x --to hf --c.d=2 --e.f").keys == ("--a.b", "1", "--c.d=2", "--e.f")

    @dataclass(frozen=True)
    class Alone:
        pad: bool = option(False, "fill up")
        keys: tuple[str, ...] = overrides("keys of a recipe")

    found = parse(Alone, "toy", ["--a.b", "1", "-2", "--pad", "--c-d.e=f"])
    assert found == Alone(True, ("--a.b", "1", "-2", "--c-d.e=f"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("m x", "the following arguments are required: --to (slimstate toy --help)"),
        ("m --to hf", "the following arguments are required: OTHER (slimstate toy --help)"),
        ("m x --to hf --rati 1", "unrecognized arguments: --rati: did you mean --ratio?"),
        ("m x --oto hf", "unrecognized arguments: --oto: did you mean --to?"),
        ("m x --to hf --seq_len=9", "unrecognized arguments: --seq_len: did you mean --seq-len?"),
        ("m x --to gguf", "--to: unknown 'gguf': choose from hf, dcp"),
        ("m x --to hf --ratio 1", "--ratio: 1 is not a number between 0 and 1"),
        ("m x --to hf --ratio nan", "--ratio: nan is not a number between 0 and 1"),
        ("m x --to hf --seed -1", "--seed: -1 is not a whole number from 0 to 99"),
        ("m x --to hf --seed 100", "--seed: 100 is not a whole number from 0 to 99"),
        ("m x --to hf --seq-len 1.5", "--seq-len: 1.5 is not a whole number of at least 1"),
        ("m x --to hf --seq-len", "--seq-len: expected one argument"),
        ("m x --to hf --names a,d", "--names: unknown 'd': choose from a, b, c"),
        ("m x --to hf --names a,", "--names: 'a,' has an empty part"),
        ("m x --to hf --names a,b,a", "--names: a,b,a names a twice"),
        ("m x --to hf --sizes 4,0", "--sizes: 0 is not a whole number of at least 1"),
        ("m x --to hf --pair 3", "--pair: invalid literal for int() with base 10: ''"),
        ("m x --to hf --pad=3", "--pad: ignored explicit argument '3'"),
    ],
)
def test_a_mistake_is_named(line: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        read(line)
    assert str(error.value).startswith(message)


def test_an_option_with_a_value_or_none_does_not_take_an_argument_away() -> None:
    for line in ("--text m x --to hf", "m --to hf --text x", "m x --to hf --text"):
        found = read(line)
        assert (found.model, found.others, found.text) == ("m", (Path("x"),), "")
    found = read("m --text t x --to hf")
    assert (found.others, found.text) == ((Path("x"),), "t")


def test_a_list_with_spaces_says_how_lists_are_written() -> None:
    with pytest.raises(UserError, match=r"unrecognized arguments: b: lists are written with comm"):
        parse(Lists, "toy", ["m", "--names", "a", "b"])


@dataclass(frozen=True)
class Lists:
    model: str = argument("MODEL", "a model")
    names: tuple[str, ...] = option((), "names")


def test_words_that_are_not_known_can_be_left() -> None:
    found, rest = parse_known(Data, "toy", ["m", "--seed", "3", "--to", "hf", "--data.x", "1"])
    assert (found, rest) == (Data(seed=3), ["m", "--to", "hf", "--data.x", "1"])


@pytest.mark.parametrize(
    "line",
    [
        "m x y --to hf",
        "m x --to dcp --out f --ratio 0.25 --names c,a --sizes 2,8 --pad --seed 3",
        "m x --to hf --seq-len 9 --radius 4.0 --is-filled --a.b c",
    ],
)
def test_a_command_line_can_be_written_again(line: str) -> None:
    found = read(line)
    assert read(" ".join(words(found))) == found
    assert sorted(words(found)) == sorted(line.split())


def test_help_has_every_option_with_its_default() -> None:
    text = " ".join(help_text(Options, "slimstate toy", "A toy.", "The end.").split())
    for part in (
        "usage: slimstate toy [-h] --to {hf,dcp} [--out FILE] [--ratio RATIO]",
        "A toy.",
        "MODEL a model",
        "--ratio RATIO 50% is half (default: 0.5)",
        "--text [TEXT] a text or the usual one --pair",
        "--names {a,b,c} names (default: a,b)",
        "--section.key VALUE keys of a recipe",
        "data: --seq-len SEQ_LEN tokens",
        "The end.",
    ):
        assert part in text
