"""Which held-out text a model is evaluated on: what the command line and the model's recipe say."""

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from flame.checkpoint.reference import ModelReference
from flame.data.config import DataConfig
from flame.errors import UserError, first_line
from flame.options import option
from flame.recipe import data_config, read_tables, sequence_length

if TYPE_CHECKING:
    from torch import Tensor

    from flame.data.heldout import Heldout

T = TypeVar("T")

SEQ_LEN = 2048
"""Tokens a row where no recipe says otherwise."""


@dataclass(frozen=True)
class HeldoutOptions:
    """Which held-out text is read, and how much of it; what is empty is the recipe's to say."""

    data: str = option("", "hub name, file or folder (default: the recipe's held-out text)")
    subset: str = option("", "configuration of a hub data set")
    split: str = option("", "split of the data set")
    text_key: str = option("", "column of the data that holds the text (default: text)")
    tokenizer: str = option("", "folder or hub name (default: the model's)", metavar="T")
    seq_len: int | None = option(
        None, f"tokens a row (default: the recipe's, or {SEQ_LEN})", least=1, metavar="N"
    )
    max_sequences: int | None = option(None, "rows to read (default: all)", least=1, metavar="N")
    spread: bool = option(False, "take these rows evenly from the whole text, not from its start")


WHICH_TEXT = (
    "dataset", "sources", "weights", "subset", "revision", "text_key", "max_documents", "heldout",
    "heldout_split", "add_eos", "varlen",
)  # fmt: skip
"""Fields of `DataConfig` on which held-out text depends."""


@dataclass(frozen=True)
class HeldoutText:
    """Held-out text that is settled: its set, its tokenizer and how it is cut into rows."""

    config: DataConfig
    tokenizer: str
    seq_len: int
    max_sequences: int | None
    spread: bool = False

    @property
    def name(self) -> str:
        """The set, and its split where one was chosen."""
        split = self.config.heldout_split
        name = self.config.heldout or self.config.dataset or " + ".join(self.config.sources)
        return f"{name}:{split}" if split else name

    @property
    def facts(self) -> dict[str, Any]:
        """What decides which tokens are read in which rows, besides the tokenizer; plain data."""
        config = dataclasses.asdict(self.config)
        return {
            **{name: config[name] for name in WHICH_TEXT},
            "seq_len": self.seq_len,
            "max_sequences": self.max_sequences,
            **({"spread": True} if self.spread else {}),
        }

    def sequences(self, vocab_size: int, apart: bool) -> "Iterator[Heldout]":
        """Rows as `flame.data.heldout.heldout_sequences` gives them.

        Args:
            vocab_size: the model's, which the tokenizer must fit in.
            apart: the model keeps packed documents apart (`cu_seqlens`).

        Raises:
            UserError: the tokenizer or the text is not there or does not fit the model.
        """
        from flame.data.heldout import heldout_sequences
        from flame.data.tokenizer import check_vocabulary, load_tokenizer

        tokenizer = load_tokenizer(self.tokenizer)
        check_vocabulary(tokenizer, vocab_size)
        config = dataclasses.replace(
            self.config,
            varlen=self.config.varlen and apart,
            add_eos=self.config.add_eos and tokenizer.eos_token_id is not None,
        )
        if self.spread and self.max_sequences is not None:
            rows = heldout_sequences(config, tokenizer, self.seq_len)
            return iter(spread_evenly(rows, self.max_sequences))
        return heldout_sequences(config, tokenizer, self.seq_len, self.max_sequences)


def heldout_text(reference: ModelReference, options: HeldoutOptions) -> HeldoutText:
    """The text that `options` and, where they leave it open, the recipe of `reference` name.

    Raises:
        UserError: neither names a text or a tokenizer, or the recipe cannot be read.
    """
    recipe = read_tables(reference.recipe)
    trained_on = data_config(recipe)
    config = _chosen(trained_on, options)
    if not (config.heldout or config.dataset or config.sources):
        raise UserError(
            f"{reference.folder} has no recipe that names held-out text: "
            "give it as --perplexity DATA"
        )
    tokenizer = tokenizer_name(reference, options.tokenizer)
    seq_len = options.seq_len or sequence_length(recipe) or _default_length(reference.config)
    return HeldoutText(config, tokenizer, seq_len, options.max_sequences, options.spread)


def spread_evenly(items: Iterable[T], count: int) -> list[T]:
    """At most `count` of the items, about as far from each other, in order.

    All items are read, and no more than twice `count` are held at a time.
    """
    kept: list[T] = []
    every = 1
    for number, item in enumerate(items):
        if number % every == 0:
            kept.append(item)
        if len(kept) > 2 * count:
            kept, every = kept[::2], 2 * every
    chosen = min(count, len(kept))
    return [kept[place * len(kept) // chosen] for place in range(chosen)]


def tokenizer_name(reference: ModelReference, given: str = "") -> str:
    """The folder or hub name of a model's tokenizer: `given`, its own or its recipe's.

    Raises:
        UserError: there is none.
    """
    own = str(reference.tokenizer) if reference.tokenizer else ""
    name = given or own or data_config(read_tables(reference.recipe)).tokenizer
    if not name:
        raise UserError(f"{reference.folder} has no tokenizer: give --tokenizer FOLDER")
    return name


def check_text(text: HeldoutText, vocab_size: int, from_recipe: bool) -> "Tensor":
    """Return the labels of the first row, int64 [1, T]; refuse a text that has none.

    Raises:
        UserError: as `HeldoutText.sequences` does; with the way out if the recipe chose the text.
    """
    try:
        return next(text.sequences(vocab_size, apart=False)).labels
    except UserError as error:
        if from_recipe and not text.config.heldout:
            hint = "the recipe names no held-out text (data.heldout): give it as --perplexity DATA"
            raise UserError(f"{first_line(error)}; {hint}") from error
        raise


def _chosen(config: DataConfig, options: HeldoutOptions) -> DataConfig:
    """The recipe's data with what the options replace; another set keeps none of its details."""
    if options.data:
        config = dataclasses.replace(
            config,
            dataset=options.data,
            sources=[],
            weights=[],
            heldout=options.data,
            heldout_split="",
            subset="",
            revision="",
            text_key=DataConfig.text_key,
            max_documents=0,
        )
    return dataclasses.replace(
        config,
        subset=options.subset or config.subset,
        heldout_split=options.split or config.heldout_split,
        text_key=options.text_key or config.text_key,
    )


def _default_length(config: dict[str, Any]) -> int:
    """2048 tokens, or as many as a model's positions allow."""
    positions = config.get("max_position_embeddings")
    return min(SEQ_LEN, positions) if isinstance(positions, int) and positions > 0 else SEQ_LEN
