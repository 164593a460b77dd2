"""The points of a sweep: what `--methods` and `--ratios` write, as command lines of `prune`.

A word of `--methods` is METHOD[:option[=value]…][@KIND[=RATIO][+KIND[=RATIO]…]]:

    drrqr                       at every ratio of --ratios, in the kinds of --space
    drrqr:f=1.2:multiple-of=8   with options of `slimstate prune`
    random@head                 at every ratio, whole heads
    jrnp:direction=low@head=0.389     one point with a ratio of its own
    l1@key=0.5+head=0.25        one plan for several kinds

A method that draws at random is a point for each seed of `--seeds`, unless its word gives one.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from flame.errors import UserError

WORD = re.compile(r"(?P<method>[^:@=]+)(?P<options>(:[^:@]+)*)(@(?P<spaces>[^:@]+))?")
SYNTAX = "METHOD[:option=value…][@KIND[=RATIO]…]"

DATA_OPTIONS = (
    "data",
    "recipe",
    "subset",
    "split",
    "text-key",
    "tokenizer",
    "sequences",
    "seq-len",
    "replay-fraction",
)
SET_BY_SWEEP = {
    "method": "the word's first part",
    "ratio": "@KIND=RATIO or --ratios",
    "space": "@KIND or --space",
    **dict.fromkeys(("stats", "to", "overwrite"), "the sweep itself"),
    **dict.fromkeys(DATA_OPTIONS, "an option of the sweep, for its one calibration"),
}
"""Options of `slimstate prune` that no word may have, with what sets them instead."""


@dataclass(frozen=True)
class Point:
    """One pruned model to measure."""

    name: str
    """Unique in the sweep; names its files."""

    method: str
    """The method with its options, as a reader sees it."""

    space: str
    """Kinds of spaces, such as `key` or `key+head`."""

    ratio: str
    """What is removed, as `--ratio` takes it."""

    own_ratio: bool
    """The ratio is the word's, not one of `--ratios`."""

    seed: int | None
    """Of a method that draws at random; points that differ in it alone are averaged."""

    words: tuple[str, ...]
    """Method and budget, as options of `slimstate prune`."""

    @property
    def file_name(self) -> str:
        """The name, with signs that every file system takes."""
        return re.sub(r"[^\w.=@+-]", "_", self.name)


@dataclass(frozen=True)
class _Word:
    """One word of `--methods`, taken apart."""

    method: str
    options: tuple[tuple[str, str | None], ...]
    ratios: tuple[tuple[str, str | None], ...]
    """By kind of space; None for the sweep's."""

    @property
    def label(self) -> str:
        settings = (name if value is None else f"{name}={value}" for name, value in self.options)
        return ":".join((self.method, *settings))

    @property
    def space(self) -> str:
        return "+".join(kind for kind, _ in self.ratios)

    @property
    def own_ratio(self) -> str | None:
        """What `--ratio` takes, if the word says it."""
        given = [ratio for _, ratio in self.ratios if ratio is not None]
        if len(given) not in (0, len(self.ratios)):
            raise UserError(f"{self.label}@{self.space}: give a ratio to every kind, or to none")
        if len(self.ratios) == 1:
            return self.ratios[0][1]
        return ",".join(f"{kind}={ratio}" for kind, ratio in self.ratios) if given else None


def points(
    methods: Sequence[str], ratios: Sequence[str], space: str, seeds: Sequence[int]
) -> tuple[Point, ...]:
    """The points of a sweep, in the order in which they were written.

    Args:
        methods: the words of `--methods`.
        ratios: for words without their own.
        space: kinds for words without their own, as `--space` takes them.
        seeds: of methods that draw at random.

    Raises:
        UserError: a word cannot be read, names no method, or says the same as another.
    """
    found: dict[str, Point] = {}
    for word in (_taken_apart(text, space) for text in methods):
        for point in _points_of(word, ratios, seeds):
            if point.name in found:
                raise UserError(f"{point.name} is in the sweep twice: leave one out")
            found[point.name] = point
    return tuple(found.values())


def _taken_apart(text: str, space: str) -> _Word:
    match = WORD.fullmatch(text.strip())
    if match is None:
        raise UserError(f"cannot read {text!r} in --methods: write {SYNTAX}")
    options = tuple(_pair(part) for part in match["options"].split(":") if part)
    for name, _ in options:
        if name in SET_BY_SWEEP:
            raise UserError(f"{text}: {name} is set by {SET_BY_SWEEP[name]}, leave it out")
    kinds = re.split(r"[+,]", match["spaces"] or space)
    return _Word(match["method"], options, tuple(_pair(kind) for kind in kinds))


def _pair(text: str) -> tuple[str, str | None]:
    name, equals, value = text.partition("=")
    return name, value if equals else None


def _points_of(word: _Word, ratios: Sequence[str], seeds: Sequence[int]) -> Iterator[Point]:
    own = word.own_ratio
    if own is None and not ratios:
        raise UserError(f"{word.label}@{word.space} has no ratio: give --ratios, such as 0.25,0.5")
    for ratio in ratios if own is None else (own,):
        for seed in seeds if _draws(word) else (None,):
            yield _point(word, ratio, own is not None, seed)


def _point(word: _Word, ratio: str, own: bool, seed: int | None) -> Point:
    drawn = "" if seed is None else f":seed={seed}"
    where = word.space if "=" in ratio else f"{word.space}={ratio}"
    if "=" in ratio:
        where = ratio.replace(",", "+")
    words = ["--method", word.method]
    for name, value in word.options:
        words += [f"--{name}"] if value is None else [f"--{name}", value]
    words += [] if seed is None else ["--seed", str(seed)]
    words += ["--space", word.space.replace("+", ","), "--ratio", ratio]
    return Point(
        name=f"{word.label}{drawn}@{where}",
        method=word.label,
        space=word.space,
        ratio=ratio,
        own_ratio=own,
        seed=seed,
        words=tuple(words),
    )


def _draws(word: _Word) -> bool:
    """Whether the method chooses by a seed, needs no statistics, and the word gives it no seed.

    Raises:
        UserError: there is no such method.
    """
    from pruning.methods import METHODS

    if word.method not in METHODS:
        raise UserError(f"unknown method {word.method!r}: choose from {', '.join(METHODS)}")
    method = METHODS[word.method]
    seeded = any(field.name == "seed" for field in dataclasses.fields(method))
    return seeded and not method.needs and "seed" not in dict(word.options)
