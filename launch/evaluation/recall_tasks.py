"""The documents of the recall tasks, as words: what is stated, what is asked, the answers."""

from collections.abc import Iterator

import numpy as np

from flame.data.mqar import FILLER, Example, Mqar, example_random, recall_example
from launch.evaluation.recall_score import WordEncoder

NEEDLE = ("The", "secret", "of", "{key}", "is", "{value}", ".")
"""The needle's sentence in a text; its first words, up to the value, ask for it."""

HAY = (
    ("The", "river", "ran", "past", "the", "old", "mill", "."),
    ("A", "train", "left", "the", "station", "in", "the", "morning", "."),
    ("She", "put", "the", "letter", "on", "the", "table", "."),
    ("Rain", "fell", "on", "the", "roof", "all", "night", "."),
    ("They", "walked", "to", "the", "market", "and", "back", "."),
    ("He", "closed", "the", "window", "and", "went", "to", "bed", "."),
)
"""Sentences of the haystack, drawn at random."""


def mqar_examples(task: Mqar, pairs: int, number: int, seed: int) -> Iterator[Example]:
    """`number` documents of `pairs` pairs each; every key asked once."""
    for n in range(number):
        yield recall_example(task, pairs, example_random(seed, f"recall {pairs}", n))


def needle_examples(
    task: Mqar, length: int, depth: int, encode: WordEncoder, number: int, seed: int
) -> Iterator[Example]:
    """Documents with one fact at `depth` percent of `length` words of hay, asked for at the end.

    Hay is filler, and the fact one pair, for a model with a token for each word of MQAR; sentences
    for a model of text.
    """
    symbols = encode.sizes is not None
    for n in range(number):
        random = example_random(seed, f"needle {length} {depth}", n)
        words = {
            "{key}": f"k{random.randint(task.keys)}",
            "{value}": f"v{random.randint(task.values)}",
        }
        template = ("{key}", "{value}") if symbols else NEEDLE
        fact = [words.get(word, word) for word in template]
        question = fact[: template.index("{value}") + 1]
        hay = [FILLER] * length if symbols else _sentences(length, random)
        place = round(depth / 100 * length) if symbols else _sentence_start(hay, depth)
        document = [*hay[:place], *fact, *hay[place:], *question]
        yield Example(document, [len(document) - 1])


def _sentences(length: int, random: np.random.RandomState) -> list[str]:
    words: list[str] = []
    while len(words) < length:
        words += HAY[random.randint(len(HAY))]
    return [*words[: length - 1], "."]


def _sentence_start(hay: list[str], depth: int) -> int:
    """Return the start of a sentence, or the text's end, that is nearest to `depth` percent."""
    starts = [0, *(n + 1 for n, word in enumerate(hay) if word == ".")]
    return min(starts, key=lambda start: abs(start - depth / 100 * len(hay)))
