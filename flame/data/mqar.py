"""Multi-query associative recall (MQAR) as generated documents.

A document states pairs of a key and a value, then asks for each key once, in a new order, the
questions strewn among filler: `k5 v1 k2 v7 . k2 v7 . k5 v1`. What is learned and measured is the
value behind a key that the document has stated; everything else is random, so it gets no label.
The task is that of Zoology (Arora et al., arXiv 2312.04927); here the answer follows its question
in the input too, and questions lie at even distances rather than by a power law.

A data set is a name with its numbers, `mqar:pairs=4/8/16,length=64,every=4000`, so that recipes
and commands take it wherever they take data. Example i is a function of seed, split and i alone.
"""

import dataclasses
import hashlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flame.errors import UserError

NAME = "mqar"
FILLER = "."
END = "<|endoftext|>"


@dataclass(frozen=True)
class Mqar:
    """The numbers of an MQAR data set; the fields are what its name may set."""

    pairs: tuple[int, ...] = (4, 8, 16)
    """Stages of the curriculum; in a name with `/` between them."""

    length: int = 64
    """Words a document: two a pair, two a question, the rest filler."""

    keys: int = 64
    """Different keys, `k0` and so on."""

    values: int = 64
    """Different values, `v0` and so on."""

    every: int = 0
    """Examples before the next stage is reached; 0 reaches all at once."""

    again: int = 0
    """1, for training, puts more questions, for keys drawn at random, in place of some of the
    filler, and some among the pairs: a document teaches more, and a model learns in a fraction of
    the tokens and wherever a pair may lie."""

    examples: int = 1000
    """Size of a split that is not `train`; that one has no end."""

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
        """The data set's name, every number said."""
        numbers = {**dataclasses.asdict(self), "pairs": "/".join(map(str, self.pairs))}
        return f"{NAME}:" + ",".join(f"{key}={value}" for key, value in numbers.items())

    def vocabulary(self) -> list[str]:
        """Every word, in the order of the token ids of `mqar_tokenizer`."""
        keys = [f"k{n}" for n in range(self.keys)]
        return [END, FILLER, *keys, *(f"v{n}" for n in range(self.values))]


@dataclass(frozen=True)
class Example:
    """The words of one document, and which of them are answers."""

    words: list[str]
    answers: list[int]
    """Positions of the values behind a question."""


def is_mqar(dataset: str) -> bool:
    """Whether a data set's name is that of MQAR."""
    return dataset.partition(":")[0] == NAME


def parse_mqar(dataset: str) -> Mqar:
    """The numbers that a name gives, e.g. `mqar:pairs=4/8,length=32`.

    Raises:
        UserError: a number is unknown, no number, or out of range.
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
    """The same set with all of its stages reached; other data sets as they are."""
    if not is_mqar(dataset):
        return dataset
    return dataclasses.replace(parse_mqar(dataset), every=0).name


def recall_example(task: Mqar, pairs: int, random: np.random.RandomState) -> Example:
    """One document of `pairs` pairs."""
    keys = [f"k{n}" for n in random.permutation(task.keys)[:pairs]]
    values = [f"v{n}" for n in random.permutation(task.values)[:pairs]]
    words: list[str] = []
    answers: list[int] = []
    seen: set[int] = set()
    for pair in _plan(task, pairs, random):
        if pair < 0:
            words.append(FILLER)
            continue
        words += [keys[pair], values[pair]]
        if pair in seen:
            answers.append(len(words) - 1)
        seen.add(pair)
    return Example(words, answers)


def _plan(task: Mqar, pairs: int, random: np.random.RandomState) -> list[int]:
    """The pairs in the order of the document, first stated, then asked; −1 is a word of filler."""
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
    """The random numbers of one example; the same in every version of numpy."""
    label = int.from_bytes(hashlib.sha256(split.encode()).digest()[:4], "big")
    return np.random.RandomState(np.random.MT19937(np.random.SeedSequence([seed, label, number])))


@dataclass
class MqarDocuments:
    """The documents of one split: without end for `train`, else `task.examples`."""

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
        """Example `number`, of a stage that is reached by then: a later one more often."""
        random = example_random(self.seed, self.split, number)
        stages = len(self.task.pairs)
        reached = min(1 + number // self.task.every, stages) if self.task.every else stages
        return recall_example(
            self.task, self.task.pairs[random.randint(0, reached, 2).max()], random
        )


def mqar_documents(dataset: str, split: str, seed: int) -> MqarDocuments:
    """The documents of `split` of the MQAR set of this name."""
    return MqarDocuments(f"{dataset} ({split})", parse_mqar(dataset), split, seed)


def mqar_tokenizer(dataset: str) -> Any:
    """A tokenizer with one token a word, so that a run on MQAR is complete as any other is."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate(parse_mqar(dataset).vocabulary())}
    model = Tokenizer(models.WordLevel(words, unk_token=END))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=model, eos_token=END, pad_token=END, unk_token=END
    )


def mqar_sizes(vocabulary: Collection[str]) -> tuple[int, int] | None:
    """How many keys and values a tokenizer's words are, if it is one of MQAR; else None."""
    keys, values = (next(n for n in count() if f"{letter}{n}" not in vocabulary) for letter in "kv")
    whole = (
        keys
        and values
        and set(vocabulary) == set(Mqar(keys=keys, values=values, pairs=(1,)).vocabulary())
    )
    return (keys, values) if whole else None


@dataclass(frozen=True)
class Answers:
    """Says which tokens of a row are answers: values behind a key that its document has stated."""

    keys: tuple[int, ...]
    """Token ids of the keys."""

    values: tuple[int, ...]

    def __call__(self, tokens: NDArray[np.int64], starts: Sequence[int]) -> NDArray[np.bool_]:
        """Whether each of the tokens `[n]` is one; documents begin at 0 and at `starts`."""
        bounds = [0, *starts, tokens.size]
        documents = [tokens[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
        return np.concatenate([self._of_document(document) for document in documents])

    def _of_document(self, tokens: NDArray[np.int64]) -> NDArray[np.bool_]:
        asked = np.isin(tokens, self.keys)
        asked[np.unique(tokens, return_index=True)[1]] = False
        is_answer = np.isin(tokens, self.values)
        is_answer[:1] = False
        is_answer[1:] &= asked[:-1]
        return is_answer


def answers_of(dataset: str, tokenizer: Any) -> Answers | None:
    """What is predicted of a data set's rows: the answers of MQAR; None for all, as in text.

    Raises:
        UserError: the tokenizer has no token for a word of the task.
    """
    if not is_mqar(dataset):
        return None
    task, vocabulary = parse_mqar(dataset), tokenizer.get_vocab()
    words = task.vocabulary()
    lacking = [word for word in words[1:] if word not in vocabulary]
    if lacking:
        raise UserError(
            f"the tokenizer has no token for {lacking[0]!r} of {dataset}: leave data.tokenizer "
            "empty, and give a model that was trained on as many keys and values"
        )
    ids = [vocabulary[word] for word in words[2:]]
    return Answers(tuple(ids[: task.keys]), tuple(ids[task.keys :]))


def _number(text: str, dataset: str) -> int:
    if not text.isdecimal():
        raise UserError(f"{dataset}: {text!r} is not a whole number")
    return int(text)


def _numbers(text: str, dataset: str) -> tuple[int, ...]:
    return tuple(_number(part, dataset) for part in text.split("/"))
