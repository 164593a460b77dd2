"""Command-line options that the stages of this package share.

The fields of the methods' dataclasses are options too, as `MethodOptions` declares.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flame.errors import UserError, first_line
from flame.options import flag_of, option, options_of, words
from pruning.calibration.products import Products
from pruning.methods import METHODS, Method

SEQUENCES = 16
"""Calibration sequences, as in arXiv 2602.04852."""
SEQ_LEN = 2048
"""Tokens of a sequence where no recipe says otherwise."""
REPLAY_TOKENS = 8192
"""Tokens on which layers are repeated without single channels where no option says otherwise. All
32,768 of a calibration cost several forward passes of the model, and more with wide heads; on 2,048
a choice of a quarter of the channels is worse by far (docs/results.md)."""
BEST = "output-error"
"""The method that chooses where none is named: docs/results.md compares it with the others."""
PUBLISHED = "drrqr"
"""The same under `--paper`: the method that arXiv 2602.04852 proposes."""
LARGEST_SEED = 2**63 - 1
"""The largest seed that random number generators take."""

MODEL_HELP = "run folder, step folder, Hugging Face folder or hub name"
BUDGET = "budget (one of --ratio, --width, --state-bytes)"
OVERWRITE_HELP = "replace an existing output that slimstate made"


def seed_option() -> Any:
    """Return the dataclass field of `--seed`."""
    return option(42, "of everything random", least=0, most=LARGEST_SEED, metavar="N")


@dataclass(frozen=True)
class DataOptions:
    """Which data a calibration reads, and how much. An empty text means the recipe's value."""

    data: str = option("", "hub name, file or folder (default: the run's recipe)")
    recipe: Path | None = option(
        None, "recipe whose [data] and sequence length count instead", metavar="RECIPE.toml"
    )
    subset: str = option("", "configuration of a hub data set")
    split: str = option("", "split of the data set (default: train)")
    text_key: str = option("", "column that holds the text")
    tokenizer: str = option("", "folder or hub name (default: the model's own)")
    sequences: int = option(SEQUENCES, "sequences to read", least=1, metavar="N")
    seq_len: int | None = option(
        None, f"tokens each (default: the recipe's, or {SEQ_LEN})", least=1, metavar="N"
    )
    replay_fraction: float | None = option(
        None,
        "part of the sequences on which output-error repeats each layer without single channels "
        f"(default: as many as hold {REPLAY_TOKENS:,} tokens)",
        above=0,
        most=1,
        metavar="F",
    )
    seed: int = seed_option()
    gram_products: Products = option(
        "auto",
        "sum Gram matrices in float64, or in short float32 pieces that are added in float64; auto "
        "takes pieces on GPUs that are slow at float64",
    )


def check_no_data(data: DataOptions, stats: Path) -> None:
    """Raise UserError if `data` says anything, beside statistics that stand in for it."""
    for word in words(data):
        raise UserError(
            f"{word} is for a calibration, which --stats {stats} stands in for: leave one out"
        )


@dataclass(frozen=True)
class MethodOptions:
    """The name of a method, and the hyper-parameters that the command line gives."""

    method: str = option(
        "",
        f"one of {', '.join(METHODS)} (default: {BEST}, with --paper {PUBLISHED})",
        metavar="NAME",
    )
    hyperparameters: Mapping[str, Any] = options_of(METHODS, without=("seed",))

    def chosen(self, seed: int, paper: bool) -> Method:
        """Return the method with the given hyper-parameters and, if `paper`, those of its paper.

        Raises:
            UserError: there is no such method, it has no such option, or it refuses the value.
        """
        name = self.method or (PUBLISHED if paper else BEST)
        if name not in METHODS:
            raise UserError(f"unknown method {name!r}: choose from {', '.join(METHODS)}")
        kind, given = METHODS[name], dict(self.hyperparameters)
        own = {field.name for field in dataclasses.fields(kind)}
        for setting in given:
            if setting not in own:
                flags = ", ".join(map(flag_of, sorted(own))) or "none"
                raise UserError(f"{flag_of(setting)} is no option of {name}: it has {flags}")
        for setting, value in (getattr(kind, "paper", {}) if paper else {}).items():
            if given.setdefault(setting, value) != value:
                raise UserError(
                    f"--paper means {flag_of(setting)} {value}, not {given[setting]}: leave one out"
                )
        if "seed" in own:
            given["seed"] = seed
        try:
            return kind(**given)
        except ValueError as error:
            raise UserError(f"method {name}: {first_line(error)}") from error
