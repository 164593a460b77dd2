"""Several sources of documents in one stream of sequences, in shares that the recipe sets.

Each sequence comes from one source, which depends only on the sequence's number n in the run. The
sources divide the unit interval by their shares, and the one that holds frac(n · φ) is taken; φ is
the golden ratio, whose multiples spread more evenly than random numbers. All sequences have equally
many tokens, so shares of sequences are shares of tokens. Each source is packed by itself.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

from flame.data.config import DataConfig
from flame.data.mqar import is_mqar
from flame.errors import UserError

OPTIONS = ("subset", "split", "revision", "text_key", "streaming", "max_documents")
"""Keys of `[data]` that the name of a source may set."""

GOLDEN = 0x9E3779B97F4A7C15
"""2⁶⁴ / φ, so that n · φ is exact in integers, on every machine."""


@dataclass
class MixedDocuments:
    """Several sets of documents, from which sequences are drawn by weight."""

    parts: Sequence[Any]
    weights: Sequence[float]
    """Share of each part in the tokens; they sum to 1."""

    @property
    def name(self) -> str:
        return " + ".join(part.name for part in self.parts)

    @property
    def size(self) -> int | None:
        sizes = [part.size for part in self.parts]
        return None if None in sizes else sum(sizes)

    def shard(self, shard: int, num_shards: int, epoch: int, start: int) -> Iterator[str]:
        """Yield the documents of all parts, one of each in turn, until none has any left.

        It serves readers of documents rather than sequences, and ignores the weights.
        """
        shards = [part.shard(shard, num_shards, epoch, 0) for part in self.parts]
        while shards:
            for texts in list(shards):
                text = next(texts, None)
                if text is None:
                    shards.remove(texts)
                elif start > 0:
                    start -= 1
                else:
                    yield text


def parts_of(documents: Any) -> Sequence[Any]:
    """Return the sets that sequences of `documents` come from: its parts, or itself."""
    return documents.parts if isinstance(documents, MixedDocuments) else [documents]


def part_of(documents: Any, sequence: int) -> int:
    """Return which of `parts_of(documents)` sequence `sequence` of the run comes from."""
    if not isinstance(documents, MixedDocuments):
        return 0
    place = (sequence * GOLDEN % 2**64) / 2**64
    for part, weight in enumerate(documents.weights):
        place -= weight
        if place < 0:
            return part
    return len(documents.weights) - 1


def source_configs(config: DataConfig) -> list[DataConfig]:
    """Return a `[data]` for each of `config.sources`, with the options that its name carries.

    Raises:
        UserError: an option is unknown or has a wrong value, or the weights do not fit.
    """
    if config.dataset:
        raise UserError("data.dataset and data.sources are both given: put all into data.sources")
    _check_weights(config)
    return [_source_config(config, source) for source in config.sources]


def shares(config: DataConfig) -> list[float]:
    """Return the share of each of `config.sources`; the shares sum to 1."""
    weights = config.weights or [1.0] * len(config.sources)
    return [weight / sum(weights) for weight in weights]


def _check_weights(config: DataConfig) -> None:
    if config.weights and len(config.weights) != len(config.sources):
        raise UserError(
            f"data.weights has {len(config.weights)} numbers for {len(config.sources)} sources: "
            "give one for each, or none for equal shares"
        )
    for weight in config.weights:
        if not (math.isfinite(weight) and weight > 0):
            raise UserError(f"data.weights has {weight}: shares of tokens must be above 0")


def _source_config(config: DataConfig, source: str) -> DataConfig:
    name, _, text = source.partition("?")
    if is_mqar(name):
        raise UserError(f"data.sources has {name}: generated recall is trained on by itself")
    given = dict(parse_qsl(text, keep_blank_values=True))
    options = {key: _option(config, source, key, value) for key, value in given.items()}
    return dataclasses.replace(config, dataset=name, sources=[], weights=[], **options)


def _option(config: DataConfig, source: str, key: str, value: str) -> Any:
    if key not in OPTIONS:
        raise UserError(f"data.sources has {source}: {key} is none of {', '.join(OPTIONS)}")
    kind = type(getattr(config, key))
    if kind is bool and value in ("true", "false"):
        return value == "true"
    if kind is int and value.isdecimal():
        return int(value)
    if kind is str and value:
        return value
    raise UserError(f"data.sources has {source}: {key} takes a {kind.__name__}, not {value!r}")
