"""Multi-query associative recall (MQAR) as generated documents.

A document states pairs of a key and a value, then asks for each key once, in a new order, with
filler between the questions: `k5 v1 k2 v7 . k2 v7 . k5 v1`. A model learns, and is measured by, the
values that follow a key which the document has stated. The other words are random and get no label.
The task is that of Zoology (Arora et al., arXiv 2312.04927), except that the answer follows its
question in the input too, and questions are spread evenly rather than by a power law.

A data set is a name that holds its numbers, such as `mqar:pairs=4/8/16,length=64,every=4000`, so
recipes and commands take it wherever they take data. Example i depends on seed, split and i alone.
"""

import dataclasses
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np

from flame.errors import UserError

NAME = "mqar"
FILLER = "."
END = "<|endoftext|>"


@dataclass(frozen=True)
class Mqar:
    """The numbers of an MQAR data set; its name may set each field.

    Raises:
        UserError: a number is out of range, or the pairs do not fit into a document.
    """

    pairs: tuple[int, ...] = (4, 8, 16)
    """Pairs in a document, at each stage of the curriculum; a name has `/` between them."""

    length: int = 64
    """Words in a document: two for each pair, two for each question, the rest filler."""

    keys: int = 64
    """Number of different keys, `k0` and so on."""

    values: int = 64
    """Number of different values, `v0` and so on."""

    every: int = 0
    """Examples before the next stage is reached; 0 reaches all stages at once."""

    again: int = 0
    """1, for training, replaces some of the filler by more questions for random keys, and moves
    some of it among the pairs. A document then teaches more: a model learns from a fraction of the
    tokens, and wherever a pair may lie."""

    examples: int = 1000
    """Examples in every split but `train`, which has no end."""

    def __post_init__(self) -> None:
        for field in ("length", "keys", "values", "examples"):
            if getattr(self, field) < 1:
                raise UserError(f"mqar {field} is {getattr(self, field)}: it must be at least 1")
        if min(self.pairs) < 1:
            raise UserError("mqar pairs must be at least 1")
        most = max(self.pairs)
        if most > min(self.keys, self.values):
            raise UserError(
                f"mqar cannot state {most} pairs with {self.keys} keys and {self.values} values: "
                "give as many of each"
            )
        if 4 * most > self.length:
            raise UserError(
                f"mqar cannot place {most} pairs in {self.length} words: a pair takes 4, so give "
                f"a length of {4 * most}, or {self.length // 4} pairs"
            )

    @property
    def name(self) -> str:
        """The data set's name, with every number."""
        numbers = {**dataclasses.asdict(self), "pairs": "/".join(map(str, self.pairs))}
        return f"{NAME}:" + ",".join(f"{key}={value}" for key, value in numbers.items())

    def vocabulary(self) -> list[str]:
        """Return every word, in the order of the token ids of `mqar_tokenizer`."""
        keys = [f"k{n}" for n in range(self.keys)]
        return [END, FILLER, *keys, *(f"v{n}" for n in range(self.values))]


@dataclass(frozen=True)
class Example:
    """The words of one document, and which of them are answers."""

    words: list[str]
    answers: list[int]
    """Positions of the values that answer a question."""


def is_mqar(dataset: str) -> bool:
    """Return whether a data set's name is that of an MQAR set."""
    return dataset.partition(":")[0] == NAME


def parse_mqar(dataset: str) -> Mqar:
    """Return the numbers in a data set's name, such as `mqar:pairs=4/8,length=32`.

    Raises:
        UserError: a field is unknown, or its value is not a number or out of range.
    """
    given: dict[str, Any] = {}
    known = [field.name for field in dataclasses.fields(Mqar)]
    for part in filter(None, dataset.partition(":")[2].split(",")):
        key, _, text = part.partition("=")
        if key not in known:
            raise UserError(f"{dataset}: unknown {key!r}, choose from {', '.join(known)}")
        given[key] = _numbers(text, dataset) if key == "pairs" else _number(text, dataset)
    return Mqar(**given)


def without_curriculum(dataset: str) -> str:
    """Return the name of the same set with all stages reached at once; other names unchanged."""
    if not is_mqar(dataset):
        return dataset
    return dataclasses.replace(parse_mqar(dataset), every=0).name


def recall_example(task: Mqar, pairs: int, random: np.random.RandomState) -> Example:
    """Return one document with `pairs` pairs, drawn from `random`."""
    keys = [f"k{n}" for n in random.permutation(task.keys)[:pairs]]
    values = [f"v{n}" for n in random.permutation(task.values)[:pairs]]
    words: list[str] = []
    answers: list[int] = []
    seen: set[int] = set()
    for pair in _pair_order(task, pairs, random):
        if pair < 0:
            words.append(FILLER)
            continue
        words += [keys[pair], values[pair]]
        if pair in seen:
            answers.append(len(words) - 1)
        seen.add(pair)
    return Example(words, answers)


def _pair_order(task: Mqar, pairs: int, random: np.random.RandomState) -> list[int]:
    """Return the pairs as a document states them, then asks for them; −1 is a word of filler."""
    room = task.length - 4 * pairs
    again = random.randint(room // 2 + 1) if task.again else 0
    filler = room - 2 * again
    early = random.randint(filler + 1) if task.again else 0
    stated = np.full(pairs + early, -1)
    stated[np.sort(random.permutation(pairs + early)[:pairs])] = np.arange(pairs)
    more = random.randint(0, pairs, again)
    asked = np.concatenate([np.arange(pairs), more, np.full(filler - early, -1)])
    return [*stated.tolist(), *random.permutation(asked).tolist()]


def example_random(seed: int, split: str, number: int) -> np.random.RandomState:
    """Return the random numbers of one example, the same in every version of numpy."""
    label = int.from_bytes(hashlib.sha256(split.encode()).digest()[:4], "big")
    return np.random.RandomState(np.random.MT19937(np.random.SeedSequence([seed, label, number])))


@dataclass
class MqarDocuments:
    """The documents of one split: endless for `train`, else `task.examples` of them."""

    name: str
    task: Mqar
    split: str
    seed: int

    @property
    def size(self) -> int | None:
        return None if self.split == "train" else self.task.examples

    def shard(self, shard: int, num_shards: int, epoch: int, start: int) -> Iterator[str]:
        first = shard + start * num_shards
        numbers = (
            count(first, num_shards) if self.size is None else range(first, self.size, num_shards)
        )
        for number in numbers:
            yield " ".join(self.example(number).words)

    def example(self, number: int) -> Example:
        """Return example `number`, of a stage reached by then; later stages come more often."""
        random = example_random(self.seed, self.split, number)
        stages = len(self.task.pairs)
        reached = min(1 + number // self.task.every, stages) if self.task.every else stages
        return recall_example(
            self.task, self.task.pairs[random.randint(0, reached, 2).max()], random
        )


def mqar_documents(dataset: str, split: str, seed: int) -> MqarDocuments:
    """Return the documents of a split of the MQAR set of this name."""
    return MqarDocuments(f"{dataset} ({split})", parse_mqar(dataset), split, seed)


def _number(text: str, dataset: str) -> int:
    if not text.isdecimal():
        raise UserError(f"{dataset}: {text!r} is not a whole number")
    return int(text)


def _numbers(text: str, dataset: str) -> tuple[int, ...]:
    return tuple(_number(part, dataset) for part in text.split("/"))
