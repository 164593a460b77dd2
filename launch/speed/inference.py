"""Reading prompts and decoding: tokens a second, latency, memory, and the operators that ran."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn

from flame.errors import UserError
from launch.speed.decoding import decode_seconds, random_prompt
from launch.speed.graph_decoding import NoGraphError, graph_seconds
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


def decode(models: Models, work: Workload, notes: list[str]) -> Iterator[Measure]:
    """Tokens a second over the batch, and milliseconds a step, of greedy cached decoding.

    As a user would run it, and as a CUDA graph where one can be made; `notes` gets a sentence for
    what is missing. A batch that does not fit ends the measure, unless it is the first.
    """
    for place, batch_size in enumerate(work.batch_sizes):
        try:
            with enough_memory(f"decoding of {batch_size} sequences", "--batch-sizes"):
                seconds = decode_seconds(
                    models,
                    batch_size,
                    work.decode_length,
                    work.prompt_length,
                    work.seed,
                    work.repeats,
                )
        except UserError as error:
            if place == 0 or not isinstance(error.__cause__, torch.OutOfMemoryError):
                raise
            notes.append(f"Batch {batch_size} and larger are missing: {error}.")
            return
        yield from _decoding_measures("", "", seconds, batch_size, work)
        graphs = _graph_seconds(models, batch_size, work, notes)
        if graphs:
            yield from _decoding_measures("_graph", " as a CUDA graph", graphs, batch_size, work)


def _decoding_measures(
    suffix: str, how: str, seconds: dict[str, list[float]], batch_size: int, work: Workload
) -> Iterator[Measure]:
    sizes = {
        "batch_size": batch_size,
        "length": work.decode_length,
        "prompt_length": work.prompt_length,
    }
    tokens, where = batch_size * work.decode_length, f"{how}, batch {batch_size}"
    yield Measure(
        f"decode{suffix}",
        f"decoding{where}",
        "tokens/s",
        "higher",
        {name: Spread.rates(tokens, times) for name, times in seconds.items()},
        sizes,
    )
    yield Measure(
        f"decode{suffix}_latency",
        f"latency of a token{where}",
        "ms",
        "lower",
        {n: Spread.milliseconds(times, work.decode_length) for n, times in seconds.items()},
        sizes,
    )


def _graph_seconds(
    models: Models, batch_size: int, work: Workload, notes: list[str]
) -> dict[str, list[float]]:
    """Seconds of each model that can decode as a CUDA graph; one after another, to save memory."""
    found: dict[str, list[float]] = {}
    missing: dict[str, list[str]] = {}
    for name, model in models.items():
        try:
            found[name] = graph_seconds(
                model,
                batch_size,
                work.decode_length,
                work.prompt_length,
                work.seed,
                work.repeats,
            )
        except NoGraphError as reason:
            missing.setdefault(f"is missing: {reason}", []).append(name)
        except torch.OutOfMemoryError:
            missing.setdefault(f"does not fit at batch {batch_size}", []).append(name)
    for why, names in missing.items():
        whose = "" if len(names) == len(models) else f" of {', '.join(names)}"
        note = f"Decoding{whose} as a CUDA graph {why}."
        if note not in notes:
            notes.append(note)
    return found


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
