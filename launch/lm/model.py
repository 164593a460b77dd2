"""An lm-eval model over any of this project's model references.

lm-eval's own way to spread work hands each rank whole documents and repeats requests where ranks
have unequal numbers; a task with fewer documents than ranks ends in an error. Here every rank shows
lm-eval a world of one: it is given all requests, answers its share of them, balanced by length, and
receives the answers of the others. So scores do not depend on the number of ranks.
"""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
    resolve_max_length,
)
from torch import Tensor

from flame.errors import UserError
from flame.process.distributed import gather_objects, local_device, world_size
from flame.process.progress import progress
from launch.lm.batching import Scored, Tokens, alike, batches, padded, score
from launch.lm.finite import check_finite
from launch.lm.generation import generate
from launch.lm.network import Network, own_share

BATCH = 32
LOGITS = 1 << 28
"""Logits of one batch at most: 1 GiB in fp32."""

MAX_GENERATED = 256
"""Tokens to generate where a task does not say, as in lm-eval."""


class SlimstateLM(TemplateLM):
    """A model and its tokenizer, as lm-eval asks them. Every method is collective."""

    def __init__(
        self,
        network: Network,
        tokenizer: Any,
        max_length: int | None = None,
        batch: int = BATCH,
    ) -> None:
        """Wrap a loaded model.

        Args:
            max_length: tokens that the model is shown at once; longer contexts are cut on the
                left. None for what its config or, failing that, its tokenizer says, as in lm-eval.
                It is not checked.
            batch: sequences a forward pass at most; long ones come in smaller batches.

        Raises:
            UserError: the tokenizer has no end-of-text token.
        """
        super().__init__()
        self.network = network
        self.tokenizer = tokenizer
        self.batch = batch
        self.max_length = max_length or resolve_max_length(network.model.config, tokenizer)
        self.truncated = 0
        """Requests of all ranks whose context was cut on the left."""
        if tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no end-of-text token, which tasks begin and end on")

    @property
    def device(self) -> torch.device:
        return local_device()

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What an empty context reads: the beginning of text, or its end if there is none."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def pad_token_id(self) -> int:
        """What shorter prompts are padded with: a token that the embedding has a row for."""
        choices = (self.tokenizer.pad_token_id, self.tokenizer.unk_token_id)
        return next((t for t in choices if t is not None and self._embeds([t])), self.eot_token_id)

    def _embeds(self, tokens: Sequence[int]) -> bool:
        """Whether the model's embedding has a row for each of `tokens`."""
        return max(tokens, default=0) < self.network.model.config.vocab_size

    @property
    def adds_bos(self) -> bool:
        """Whether the tokenizer puts a beginning of text before what it encodes."""
        bos = self.tokenizer.bos_token_id
        return bos is not None and self.tokenizer.encode("a")[:1] == [bos]

    def description(self) -> dict[str, Any]:
        """What a score depends on besides the task."""
        return {
            "dtype": str(self.network.dtype).removeprefix("torch."),
            "sharded": self.network.sharded,
            "world_size": world_size(),
            "batch": self.batch,
            "max_length": self.max_length,
            "adds_bos": self.adds_bos,
            "prefix_token": self.tokenizer.decode([self.prefix_token_id]),
            "truncated": self.truncated,
        }

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids; special ones as the tokenizer likes, but no second beginning of text.

        The name of a special token that the embedding has no row for is encoded as plain text.
        """
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        begins = string.startswith(self.tokenizer.decode([self.prefix_token_id]))
        if add_special_tokens is None and begins:
            options = {"add_special_tokens": False}
        tokens = self.tokenizer.encode(string, **options)
        if self._embeds(tokens):
            return tokens
        return self.tokenizer.encode(string, split_special_tokens=True, **options)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Scored]:
        """The log-likelihood of each request's continuation after its context."""

        def answer(own: list[Any]) -> list[Scored]:
            return super(SlimstateLM, self).loglikelihood(own, disable_tqdm=True)

        return self._answers(requests, answer)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each request's whole text, every token predicted once."""
        return self._answers(requests, self._rolling)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each request's context, up to a stop sequence."""
        return self._answers(requests, self._generated)

    def _answers(self, requests: list[Any], answer: Callable[[list[Any]], list[Any]]) -> list[Any]:
        own = own_share(alike(requests))
        before, self.truncated = self.truncated, 0
        with self.network.company():
            answers = answer([requests[n] for n in own])
        parts = gather_objects((dict(zip(own, answers, strict=True)), self.truncated))
        self.truncated = before + sum(truncated for _, truncated in parts)
        found = {n: value for part, _ in parts for n, value in part.items()}
        check_finite(found.values())
        return [found[n] for n in range(len(requests))]

    def _rolling(self, requests: list[Any]) -> list[float]:
        windows = [self._windows(request.args[0]) for request in requests]
        scored = iter(self._loglikelihood_tokens([w for text in windows for w in text]))
        return [math.fsum(next(scored)[0] for _ in text) for text in windows]

    def _windows(self, text: str) -> list[tuple[Any, list[int], list[int]]]:
        tokens = self.tok_encode(text)
        windows = utils.get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1)
        return [(None, *utils.make_disjoint_window(window)) for window in windows]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[Scored]:
        """Scores of (name, context, continuation); requests with the same input share a pass."""
        asked: dict[Tokens, list[int]] = defaultdict(list)
        for n, (_, context, continuation) in enumerate(requests):
            asked[self._input(context, continuation)].append(n)
        scores: dict[int, Scored] = {}
        limit = LOGITS // self.network.model.config.vocab_size
        for batch in progress(list(batches(asked, len, self.batch, limit)), "score"):
            for inputs, logits in zip(batch, self._logits(batch), strict=True):
                for n in asked[inputs]:
                    scores[n] = score(logits[: len(inputs)], requests[n][2])
        return [scores[n] for n in range(len(requests))]

    def _input(self, context: list[int], continuation: list[int]) -> Tokens:
        """What the model reads to predict `continuation`, cut on the left where it is too long."""
        if not continuation:
            raise UserError("a task asks for the likelihood of a continuation without a token")
        if len(continuation) > self.max_length:
            raise UserError(
                f"a continuation of {len(continuation)} tokens is longer than the "
                f"{self.max_length} that the model is shown at once: give a larger --max-length"
            )
        tokens = (context or [self.prefix_token_id]) + continuation
        self.truncated += len(tokens) > self.max_length + 1
        return tuple(tokens[-(self.max_length + 1) : -1])

    @torch.no_grad()
    def _logits(self, batch: list[Tokens]) -> Tensor:
        """Logits `[B, T, V]`, rows padded on the right, where a causal model does not look."""
        rows = padded(batch, 0, left=False).to(self.device)
        return self.network.model(input_ids=rows, use_cache=False).logits

    def _generated(self, requests: list[Any]) -> list[str]:
        kinds: dict[str, list[int]] = defaultdict(list)
        for n, request in enumerate(requests):
            kinds[json.dumps(request.args[1], sort_keys=True, default=str)].append(n)
        texts: dict[int, str] = {}
        for members in kinds.values():
            settings = requests[members[0]].args[1]
            contexts = [requests[n].args[0] for n in members]
            texts.update(zip(members, self._continued(contexts, settings), strict=True))
        return [texts[n] for n in range(len(requests))]

    def _continued(self, contexts: list[str], settings: dict[str, Any]) -> list[str]:
        """Continuations of `contexts`, all with the same generation settings."""
        options = normalize_gen_kwargs(settings, MAX_GENERATED)
        end = self.tokenizer.decode([self.eot_token_id])
        stop = handle_stop_sequences(options.pop("until", None), eos=end)
        length = options.pop("max_gen_toks")
        prompts = self._prompts(contexts, length)
        numbers = range(len(prompts))
        limit = LOGITS // self.network.model.config.vocab_size
        texts: dict[int, str] = {}
        parts = batches(numbers, lambda n: len(prompts[n]), self.batch, limit)
        for batch in progress(list(parts), "generate"):
            rows = generate(
                self.network.model, self.tokenizer, self.pad_token_id,
                [prompts[n] for n in batch], length, stop, options,
            )  # fmt: skip
            for n, tokens in zip(batch, rows, strict=True):
                text = self.tokenizer.decode(self._ended(tokens), skip_special_tokens=True)
                texts[n] = postprocess_generated_text(text, stop, None)
        return [texts[n] for n in numbers]

    def _ended(self, tokens: list[int]) -> list[int]:
        """`tokens` up to the end of text: others of a batch may have gone on for longer."""
        end = self.eot_token_id
        return tokens[: tokens.index(end)] if end in tokens else tokens

    def _prompts(self, contexts: list[str], length: int) -> list[Tokens]:
        """Token ids of `contexts`, cut on the left to leave room for `length` more."""
        room = self.max_length - length
        if room < 1:
            raise UserError(
                f"a task generates {length} tokens, and the model is shown {self.max_length} at "
                "once: give a larger --max-length"
            )
        prompts = [self.tok_encode(context) for context in contexts]
        self.truncated += sum(len(prompt) > room for prompt in prompts)
        return [tuple(prompt[-room:]) or (self.prefix_token_id,) for prompt in prompts]
