"""Which sequences a calibration reads: the training data pipeline, bounded and seeded.

The defaults are those that the model was trained with, from its run folder's recipe.
"""

import dataclasses
import logging
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from typing import Any

from flame.checkpoint.reference import ModelReference
from flame.data.config import DataConfig
from flame.data.mqar import without_curriculum
from flame.errors import UserError
from flame.recipe import data_config, read_tables, sequence_length
from pruning.calibration.products import Products
from pruning.options import REPLAY_TOKENS, SEQ_LEN, SEQUENCES, DataOptions
from pruning.spaces import Space

log = logging.getLogger(__name__)

NOT_RECORDED = ("heldout", "heldout_split", "max_bad_rows", "repeat", "seed", "tokenizer")
"""Fields that do not identify the calibration text, or are recorded elsewhere."""


@dataclass(frozen=True)
class CalibrationData:
    """A bounded part of a token stream, the same at every world size."""

    config: DataConfig
    tokenizer: str
    """A folder or hub name."""
    sequences: int
    seq_len: int
    """Tokens a sequence."""
    replay_fraction: float = 1.0
    """Part of the sequences on which layers are repeated without single channels."""
    asked: str = ""
    """Both numbers in words, with the options that they come from, for messages."""
    gram_products: Products = "auto"
    """How outer products are summed; no part of the record, since the sums are the same."""

    @property
    def tokens(self) -> int:
        """Of all sequences."""
        return self.sequences * self.seq_len

    def record(self) -> dict[str, Any]:
        """The settings that identify the data, as plans and statistics record them."""
        values = dataclasses.asdict(self.config)
        found = {key: value for key, value in values.items() if key not in NOT_RECORDED}
        if self.replay_fraction != 1:
            found["replay_fraction"] = self.replay_fraction
        return found

    @property
    def replayed_tokens(self) -> int:
        """Of the sequences on which layers are repeated."""
        return self.seq_len * sum(map(self.is_replayed, range(self.sequences)))

    def is_replayed(self, sequence: int) -> bool:
        """Whether layers are repeated on the `sequence`-th sequence, from 0: spread evenly."""
        return _is_replayed(sequence, self.replay_fraction)

    def too_short(self, found: str = "it ends before") -> str:
        """The message for data that has fewer sequences than asked for."""
        asked = self.asked or f"{self.sequences} sequences of {self.seq_len} tokens"
        return f"{asked} are too many: {found}; ask for fewer, or give more text (--data)"

    def documents(self) -> Any:
        """The documents, as `flame.data.sources.build_documents` gives them."""
        from flame.data.sources import build_documents

        return build_documents(self.config, self.config.split)

    def loader(self, rank: int, world_size: int) -> Any:
        """One rank's loader of its share of the sequences, one in each batch.

        So no sum depends on a batch size.

        Raises:
            UserError: the data or the tokenizer is not there, `world_size` does not divide the
                virtual shards, or a shard has no document.
        """
        from flame.data.loader import PackedLoader
        from flame.data.tokenizer import load_tokenizer

        return PackedLoader(
            self.documents(),
            load_tokenizer(self.tokenizer),
            self.config,
            seq_len=self.seq_len,
            local_batch_size=1,
            rank=rank,
            world_size=world_size,
        )


def calibration_data(reference: ModelReference, options: DataOptions) -> CalibrationData:
    """The data that `options` describe, with `options.recipe` where they say nothing.

    Without that, the recipe of `reference` stands in.

    Another data set (`options.data`) drops the recipe's sources, subset, split and text column.
    The tokenizer is that of `options`, else the model's own, else the recipe's. The seed and the
    number of sequences are those of `options`.

    Raises:
        UserError: neither names data or a tokenizer, or the recipe cannot be read.
    """
    recipe = read_tables(options.recipe or reference.recipe)
    config = data_config(recipe)
    if options.data:
        config = dataclasses.replace(config, dataset=options.data, **_FRESH)
    config = dataclasses.replace(config, dataset=without_curriculum(config.dataset))
    for key in ("subset", "split", "text_key"):
        if getattr(options, key):
            config = dataclasses.replace(config, **{key: getattr(options, key)})
    if not (config.dataset or config.sources):
        raise UserError(
            f"{reference.folder} has no recipe that names its training data: give --data or "
            "--recipe"
        )
    of_recipe = sequence_length(recipe)
    seq_len = options.seq_len or of_recipe or SEQ_LEN
    return CalibrationData(
        config=dataclasses.replace(config, seed=options.seed, repeat=False),
        tokenizer=_tokenizer(reference, options, config),
        sequences=options.sequences,
        seq_len=seq_len,
        replay_fraction=_replay_fraction(options, seq_len),
        asked=_asked(options, seq_len, of_recipe is not None),
        gram_products=options.gram_products,
    )


def replayed_tokens(options: DataOptions, seq_len: int) -> int:
    """Tokens on which layers are repeated, with sequences of `seq_len` tokens."""
    part = _replay_fraction(options, seq_len)
    return seq_len * sum(_is_replayed(sequence, part) for sequence in range(options.sequences))


def _is_replayed(sequence: int, fraction: float) -> bool:
    part = Fraction(repr(fraction))
    return ceil((sequence + 1) * part) > ceil(sequence * part)


def _replay_fraction(options: DataOptions, seq_len: int) -> float:
    """The part that is asked for, or that of the fewest sequences with enough tokens."""
    if options.replay_fraction is not None:
        return options.replay_fraction
    return min(1.0, ceil(REPLAY_TOKENS / seq_len) / options.sequences)


def check_data(data: CalibrationData, vocab_size: int, world_size: int) -> None:
    """Refuse data that cannot be calibrated on, before any process starts.

    Raises:
        UserError: the tokenizer is not the model's, the data is not there or too short, or the
            processes do not divide its virtual shards.
    """
    from flame.data.loader_checks import TooShortError, check_enough, check_order
    from flame.data.tokenizer import check_vocabulary, load_tokenizer

    check_order(data.config.virtual_shards, world_size)
    tokenizer = load_tokenizer(data.tokenizer)
    check_vocabulary(tokenizer, vocab_size)
    documents = data.documents()
    try:
        check_enough(documents, tokenizer, data.config, data.seq_len, data.sequences)
    except TooShortError as error:
        raise UserError(data.too_short(error.found)) from error


def warn_of_few_tokens(data: CalibrationData, spaces: list[Space]) -> None:
    """Log a warning if there are fewer calibration tokens than key channels in a head."""
    tokens = data.sequences * data.seq_len
    channels = max((space.head_dim for space in spaces if space.kind == "key"), default=0)
    if tokens < channels:
        log.warning(
            "slimstate: warning: %d calibration tokens for %d key channels a head: the Gram "
            "matrix of the activations has no full rank, so the choice among the channels beyond "
            "its rank is arbitrary: give more (--sequences, --seq-len)",
            tokens,
            channels,
        )


def _asked(options: DataOptions, seq_len: int, of_recipe: bool) -> str:
    """How much data is asked for, each number by its option or by where else it comes from."""
    sequences = f"--sequences {options.sequences}"
    if options.sequences == SEQUENCES:
        sequences = f"{SEQUENCES} sequences (the default)"
    origin = "the recipe's" if of_recipe else "the default"
    length = f"--seq-len {seq_len}" if options.seq_len else f"{seq_len} tokens ({origin})"
    return f"{sequences} of {length}"


_FRESH: dict[str, Any] = {
    "sources": [],
    "weights": [],
    "subset": DataConfig.subset,
    "split": DataConfig.split,
    "revision": DataConfig.revision,
    "text_key": DataConfig.text_key,
    "max_documents": DataConfig.max_documents,
}
"""The settings that describe the recipe's own data set, and are reset for another one."""


def _tokenizer(reference: ModelReference, options: DataOptions, config: DataConfig) -> str:
    own = str(reference.tokenizer) if reference.tokenizer else ""
    found = options.tokenizer or own or config.tokenizer
    if not found:
        raise UserError(
            f"{reference.folder} has no tokenizer, and calibration reads text: give --tokenizer"
        )
    return found
