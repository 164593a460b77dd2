"""The options of a sweep, and what of them goes on to `prune`, `calibrate` and `train`."""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from flame.errors import UserError
from flame.recipe import option_name
from launch.evaluation.heldout_text import HeldoutOptions
from launch.evaluation.perplexity import DTYPES
from launch.sweeping.folder import SweepFolder
from launch.sweeping.points import SYNTAX, Point, listed, numbers, points
from launch.sweeping.work import CONTINUED, DENSE, Recovery

SET_BY_SWEEP = ("job.config_file", "job.dump_folder", "model.init", "model.config")
SAVE_EVERY = 16
"""Calibration sequences between resume points."""


@dataclass(frozen=True)
class Options:
    model: str
    out: SweepFolder
    points: tuple[Point, ...]
    ratios: tuple[str, ...]
    """Columns of the table."""

    methods: tuple[str, ...]
    """Names of the methods, each once."""

    budget_words: tuple[str, ...] = ()
    """Options of `slimstate prune` for all points."""

    data_words: tuple[str, ...] = ()
    """Options of `slimstate calibrate`."""

    text: HeldoutOptions = field(default_factory=HeldoutOptions)
    dtype: str = "auto"
    recovery: Recovery | None = None
    dense_continued: bool = False
    keep: bool = False
    json: Path | None = None
    overwrite: bool = False
    title: str = ""
    arguments: tuple[str, ...] = ()
    """The command line, for the record."""

    @property
    def names(self) -> list[str]:
        """All that is measured, controls first, by the names of its files."""
        controls = [DENSE, CONTINUED] if self.dense_continued else [DENSE]
        return [*controls, *(point.file_name for point in self.points)]

    @property
    def needing(self) -> tuple[str, ...]:
        """The methods that need statistics."""
        from pruning.methods import METHODS

        return tuple(name for name in self.methods if METHODS[name].needs)


def parse_options(argv: list[str] | None) -> Options:
    """Options from a command line, by default this process's."""
    given = argv = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    if {"-h", "--help"} & set(argv):
        parser.parse_args(argv)
    overrides, argv = _recipe_overrides(argv)
    data_words, argv = _data_words(argv)
    budget_words, space, argv = _budget_words(argv)
    values = parser.parse_args(argv)
    options = _options(values, space, budget_words, data_words, overrides)
    return replace(options, arguments=tuple(given))


def calibration_words(options: Options) -> list[str]:
    """The command line of `slimstate calibrate` for the statistics of a sweep."""
    words = [options.model, str(options.out.statistics), "--methods", ",".join(options.needing)]
    return [*words, *options.data_words, "--save-every", str(SAVE_EVERY)]


def _parser() -> argparse.ArgumentParser:
    from pruning import options as shared

    parser = shared.Parser("sweep", "Prune a model by many methods and ratios, and measure all.")
    parser.epilog = (
        "Options of slimstate prune and calibrate about budget and data hold for all points: "
        f"{_names(_add_budget)}, {_names(_add_data)}. With --recover, --section.key VALUE "
        "overrides a key of its recipe."
    )
    parser.add_argument("model", metavar="MODEL", help=shared.MODEL_HELP)
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write; resumed if begun")
    add = parser.add_argument
    add("--methods", required=True, metavar="A,B", help=f"{SYNTAX} each")
    add("--ratios", default="", metavar="R,R", help="parts to remove, such as 0.25,0.5,0.75")
    add("--seeds", default="0", metavar="N,N", help="of methods that draw (default: %(default)s)")
    add("--recover", type=Path, metavar="RECIPE", help="train pruned models on; measure again")
    add("--dense-continued", action="store_true", help="train the dense model on too, as control")
    add("--heldout", default="", metavar="DATA", help="text to measure on (default: the recipe's)")
    add("--heldout-split", default="", metavar="SPLIT", help="split of it")
    add("--max-sequences", type=shared.whole(1), metavar="N", help="rows of it (default: all)")
    add("--dtype", choices=DTYPES, default="auto", help="compute dtype of measuring")
    add("--keep", action="store_true", help="keep all pruned and recovered models")
    add("--json", type=Path, metavar="FILE", help="write the results here too")
    add("--title", default="", help="of the page")
    add("--overwrite", action="store_true", help="start afresh: remove an earlier sweep in OUT")
    return parser


def _options(
    values: argparse.Namespace,
    space: str,
    budget_words: Sequence[str],
    data_words: Sequence[str],
    overrides: Sequence[str],
) -> Options:
    methods = listed(values.methods, "--methods")
    ratios = listed(values.ratios, "--ratios") if values.ratios else ()
    seeds = numbers(listed(values.seeds, "--seeds"), "--seeds")
    if values.recover is None and (overrides or values.dense_continued):
        given = overrides[0] if overrides else "--dense-continued"
        raise UserError(f"{given} is for a recovery: give --recover RECIPE.toml")
    for name in map(option_name, overrides):
        if name in SET_BY_SWEEP:
            raise UserError(f"--{name} is the sweep's to set for each point: leave it out")
    found = points(methods, ratios, space, seeds)
    return Options(
        model=values.model,
        out=SweepFolder(values.out),
        points=found,
        ratios=ratios,
        methods=tuple(dict.fromkeys(point.words[1] for point in found)),
        budget_words=tuple(budget_words),
        data_words=tuple(data_words),
        text=HeldoutOptions(
            data=values.heldout,
            split=values.heldout_split,
            text_key=_given(data_words, "--text-key"),
            tokenizer=_given(data_words, "--tokenizer"),
            max_sequences=values.max_sequences,
        ),
        dtype=values.dtype,
        recovery=values.recover and Recovery(values.recover, tuple(overrides)),
        dense_continued=values.dense_continued,
        keep=values.keep,
        json=values.json,
        overwrite=values.overwrite,
        title=values.title,
    )


def _recipe_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """`--section.key VALUE` and `--section.key=VALUE` of a command line, and the rest of it."""
    overrides: list[str] = []
    rest: list[str] = []
    takes_value = False
    for word in argv:
        if takes_value and not word.startswith("--"):
            overrides.append(word)
            takes_value = False
        elif re.match(r"--[\w-]+\.[\w.-]+(=|$)", word):
            overrides.append(word)
            takes_value = "=" not in word
        else:
            rest.append(word)
            takes_value = False
    return overrides, rest


def _data_words(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    parser = _bare_parser(_add_data)
    values, rest = parser.parse_known_args(argv)
    return _as_words(parser, values), rest


def _budget_words(argv: Sequence[str]) -> tuple[list[str], str, list[str]]:
    """Budget options, the kinds of `--space`, and the rest of a command line."""
    parser = _bare_parser(_add_budget)
    unset = "0"
    values, rest = parser.parse_known_args(["--ratio", unset, *argv])
    if values.ratio != unset:
        raise UserError(f"--ratio {values.ratio}: a sweep takes --ratios, such as 0.25,0.5")
    values.ratio = parser.get_default("ratio")
    space, values.space = values.space, parser.get_default("space")
    return _as_words(parser, values), space, rest


def _add_budget(parser: argparse.ArgumentParser) -> None:
    from pruning.options import add_budget_options

    add_budget_options(parser)


def _add_data(parser: argparse.ArgumentParser) -> None:
    from pruning.options import add_data_options, add_seed_option

    add_data_options(parser)
    add_seed_option(parser)


def _bare_parser(add: Callable[[argparse.ArgumentParser], None]) -> argparse.ArgumentParser:
    from pruning.options import Parser

    parser = Parser("sweep", "")
    add(parser)
    return parser


def _as_words(parser: argparse.ArgumentParser, values: argparse.Namespace) -> list[str]:
    """The options in `values` that are not at their defaults, as a command line has them."""
    words = []
    for name, value in vars(values).items():
        if value == parser.get_default(name):
            continue
        flag = f"--{name.replace('_', '-')}"
        words += [flag] if value is True else [flag, str(value)]
    return words


def _names(add: Callable[[argparse.ArgumentParser], None]) -> str:
    parser = _bare_parser(add)
    known = vars(parser.parse_known_args(["--ratio", "0"])[0])
    return ", ".join(f"--{name.replace('_', '-')}" for name in known if name != "ratio")


def _given(words: Sequence[str], option: str) -> str:
    return words[words.index(option) + 1] if option in words else ""
