"""Accuracy of the answers in documents of words: right if the model's first choice is every token.

Words are encoded one by one, so a word's tokens are known in any tokenizer, and models with
different ones are asked the same.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flame.data.mqar import Example
from flame.data.mqar_tokens import mqar_sizes
from flame.errors import UserError
from flame.process.dealing import batched, turns
from flame.process.distributed import local_device


class WordEncoder:
    """Words to token ids by a model's tokenizer, each word encoded once."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}

    def __call__(self, word: str) -> list[int]:
        if word not in self._known:
            # With the space before it, as a byte-level vocabulary has words in a sentence.
            ids = self.tokenizer.encode(f" {word}", add_special_tokens=False)
            if not ids or ids == [self.tokenizer.unk_token_id]:
                raise UserError(
                    f"the tokenizer has no token for {word!r}: the model was trained on other "
                    "sizes of the task, or is no model of text; give --pairs and --length"
                )
            self._known[word] = ids
        return self._known[word]

    @property
    def sizes(self) -> tuple[int, int] | None:
        """Keys and values of a vocabulary that is MQAR's own; None for one of text."""
        return mqar_sizes(self.tokenizer.get_vocab())


def accuracy(
    model: nn.Module, examples: Iterable[Example], encode: WordEncoder, batch_size: int
) -> float:
    """The share of all answers that `model` gives right. Collective."""
    counts = torch.zeros(2, dtype=torch.int64)
    for turn in turns(batched(examples, batch_size)):
        right = right_answers(model, turn.item, encode)
        if turn.counts:
            counts += torch.tensor([sum(right), len(right)])
    if dist.is_initialized():
        dist.all_reduce(counts)
    return int(counts[0]) / int(counts[1])


@torch.no_grad()
def right_answers(
    model: Callable[..., Any], examples: Sequence[Example], encode: WordEncoder
) -> list[bool]:
    """For every answer of `examples`, in order, whether the model's first choice is all its tokens.

    Args:
        model: returns `.logits` `[B, T, vocabulary]` for `input_ids` `[B, T]`, causal.
    """
    tokens, _ = token_rows(examples, encode)
    logits = model(input_ids=tokens, use_cache=False).logits
    if not bool(torch.isfinite(logits).all()):
        raise UserError(
            "the model gives logits that are not finite: try --dtype float32, "
            "on the CPU if the GPU's kernels refuse it"
        )
    hit = (logits[:, :-1].argmax(-1) == tokens[:, 1:]).cpu()
    return [
        bool(hit[row, begin - 1 : end - 1].all())
        for row, example in enumerate(examples)
        for begin, end in answer_spans(example, encode)
    ]


def token_rows(examples: Sequence[Example], encode: WordEncoder) -> tuple[Tensor, list[int]]:
    """The documents as rows of tokens `[B, T]` on this process's device, and their lengths.

    Shorter ones are padded behind, without a mask: what follows a token does not change its logits.
    """
    rows = [torch.tensor([i for w in example.words for i in encode(w)]) for example in examples]
    tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return tokens.to(local_device()), [len(row) for row in rows]


def answer_spans(example: Example, encode: WordEncoder) -> list[tuple[int, int]]:
    """First token and the one after the last of each answer."""
    sizes = [len(encode(word)) for word in example.words]
    ends = list(accumulate(sizes))
    return [(ends[n] - sizes[n], ends[n]) for n in example.answers]
