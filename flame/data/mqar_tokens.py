"""MQAR as tokens: its tokenizer, and which tokens of a row are answers to be predicted."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flame.data.mqar import END, Mqar, is_mqar, parse_mqar
from flame.errors import UserError


def mqar_tokenizer(dataset: str) -> Any:
    """Return a tokenizer with one token for each word of the MQAR set of this name."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate(parse_mqar(dataset).vocabulary())}
    model = Tokenizer(models.WordLevel(words, unk_token=END))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=model, eos_token=END, pad_token=END, unk_token=END
    )


def mqar_sizes(vocabulary: Collection[str]) -> tuple[int, int] | None:
    """Return the numbers of keys and values in a tokenizer's vocabulary, None if not MQAR's."""
    keys, values = (next(n for n in count() if f"{letter}{n}" not in vocabulary) for letter in "kv")
    if not (keys and values):
        return None
    whole = set(vocabulary) == set(Mqar(keys=keys, values=values, pairs=(1,)).vocabulary())
    return (keys, values) if whole else None


@dataclass(frozen=True)
class Answers:
    """Finds the answers in a row: values that follow a key which its document stated before."""

    keys: tuple[int, ...]
    """Token ids of the keys."""

    values: tuple[int, ...]
    """Token ids of the values."""

    def __call__(self, tokens: NDArray[np.int64], starts: Sequence[int]) -> NDArray[np.bool_]:
        """Return whether each token `[n]` is an answer; documents begin at 0 and at `starts`."""
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
    """Return what finds the tokens to predict: the answers of MQAR, None for any other data set.

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
