"""Reading prompts and decoding: tokens a second, latency, memory, and the operators that ran."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn

from launch.speed.decoding import decode_seconds, random_prompt
from launch.speed.kernel_trace import operators_of
from launch.speed.timing import Spread
from launch.speed.workload import (
    Measure,
    Models,
    Workload,
    enough_memory,
    peaks_of,
    seconds_of,
    weight_bytes,
)


def prefill(models: Models, work: Workload) -> Iterator[Measure]:
    """Tokens a second at which one prompt of each length is read, and the memory of the longest."""
    for length in work.lengths:
        sizes = {"batch_size": 1, "length": length}
        with enough_memory(f"a prompt of {length} tokens", "--lengths"):
            read = partial(_reading, length=length, seed=work.seed)
            seconds = seconds_of(models, read, work.repeats)
        rates = {name: Spread.rates(length, times) for name, times in seconds.items()}
        yield Measure(
            "prefill", f"prefill of {length:,} tokens", "tokens/s", "higher", rates, sizes
        )
    longest = max(work.lengths)
    yield Measure(
        "prefill_peak_bytes",
        f"peak memory, prefill of {longest:,} tokens",
        "bytes",
        "lower",
        peaks_of(models, partial(_reading, length=longest, seed=work.seed), weight_bytes),
        {"batch_size": 1, "length": longest},
    )


def decode(models: Models, work: Workload) -> Iterator[Measure]:
    """Tokens a second over the batch, and milliseconds a step, of greedy cached decoding."""
    for batch_size in work.batch_sizes:
        with enough_memory(f"decoding of {batch_size} sequences", "--batch-sizes"):
            seconds = decode_seconds(
                models,
                batch_size,
                work.decode_length,
                work.prompt_length,
                work.seed,
                work.repeats,
            )
        sizes = {
            "batch_size": batch_size,
            "length": work.decode_length,
            "prompt_length": work.prompt_length,
        }
        tokens = batch_size * work.decode_length
        where = f"batch {batch_size}"
        yield Measure(
            "decode",
            f"decoding, {where}",
            "tokens/s",
            "higher",
            {name: Spread.rates(tokens, times) for name, times in seconds.items()},
            sizes,
        )
        yield Measure(
            "decode_latency",
            f"latency of a token, {where}",
            "ms",
            "lower",
            {n: Spread.milliseconds(times, work.decode_length) for n, times in seconds.items()},
            sizes,
        )


def kernels(models: Models, work: Workload) -> dict[str, dict[str, list[str]]]:
    """Operators that ran, by model, in `prefill` and `decode` (`launch.speed.kernel_trace`)."""
    length = max(work.lengths)
    return {
        name: {
            "prefill": operators_of(_reading(model, length, work.seed)),
            "decode": _decoding_operators(model, work),
        }
        for name, model in models.items()
    }


@torch.no_grad()
def _decoding_operators(model: nn.Module, work: Workload) -> list[str]:
    prompt = random_prompt(model, 1, work.prompt_length, work.seed)
    cache = model(input_ids=prompt, use_cache=True, logits_to_keep=1).past_key_values
    return operators_of(
        lambda: model(input_ids=prompt[:, :1], past_key_values=cache, use_cache=True)
    )


def _reading(model: nn.Module, length: int, seed: int) -> Callable[[], object]:
    prompt = random_prompt(model, 1, length, seed)

    @torch.no_grad()
    def read() -> object:
        return model(input_ids=prompt, use_cache=True, logits_to_keep=1)

    return read
