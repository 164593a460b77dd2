"""Greedy and sampled continuations of a batch of prompts."""

from typing import Any

import torch
from torch import nn

from flame.process.distributed import local_device
from launch.lm.batching import Tokens, padded


@torch.no_grad()
def generate(
    model: nn.Module,
    tokenizer: Any,
    pad_token_id: int,
    batch: list[Tokens],
    length: int,
    stop: list[str],
    options: dict[str, Any],
) -> list[list[int]]:
    """The token ids that the model adds to each prompt of a batch, with its recurrent cache.

    Args:
        model: a causal language model of transformers.
        tokenizer: decodes the tokens in which `stop` is searched.
        pad_token_id: what shorter prompts are padded with, on the left and under a mask.
        batch: the prompts.
        length: tokens to add at most.
        stop: texts that end a continuation.
        options: generation settings as transformers takes them, from the task.
    """
    from lm_eval.models.utils_hf import stop_sequences_criteria

    device = local_device()
    rows = padded(batch, pad_token_id, left=True).to(device)
    mask = padded([(1,) * len(tokens) for tokens in batch], 0, left=True).to(device)
    size, width = rows.shape
    options = dict(options)
    if not options.get("do_sample") and options.get("temperature", 0.0) == 0.0:
        options.pop("temperature", None)
    total = options.pop("max_length", width + length)
    generated = model.generate(  # type: ignore[operator]
        input_ids=rows,
        attention_mask=mask,
        max_length=total,
        stopping_criteria=stop_sequences_criteria(tokenizer, stop, width, size),
        pad_token_id=pad_token_id,
        use_cache=True,
        synced_gpus=False,
        **options,
    )
    return generated[:, width:].tolist()
