"""What a benchmark measures of models that take turns: sizes, prefill, decoding, training, a mixer.

Tokens are random ids and weights the model's own: neither changes how much is computed.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from flame.errors import UserError
from flame.model import count_parameters
from launch.speed.decoding import decode_seconds, random_prompt
from launch.speed.kernel_trace import operators_of
from launch.speed.peak_memory import peak_bytes
from launch.speed.timing import Spread, take_turns, timed

Models = Mapping[str, nn.Module]


@dataclass(frozen=True)
class Workload:
    """Sizes of what is timed."""

    lengths: tuple[int, ...]
    """Tokens of the prompts that are read, one sequence each."""

    batch_sizes: tuple[int, ...]
    """Sequences decoded together."""

    decode_length: int
    """Tokens decoded for each sequence."""

    prompt_length: int
    """Tokens that decoding starts from."""

    train_batch: int
    train_length: int
    repeats: int = 5
    seed: int = 0


ON_CPU = Workload((256, 1024), (1, 8), 32, 32, 4, 256)
ON_CUDA = Workload((1024, 4096, 16384), (1, 16, 64), 64, 128, 4, 2048)


@dataclass(frozen=True)
class Measure:
    """One row of a benchmark: one quantity of every model."""

    name: str
    label: str
    unit: str
    better: str
    """`higher` or `lower`."""

    values: Mapping[str, Spread]
    """By model; one that has no such quantity is left out."""

    sizes: Mapping[str, int] = field(default_factory=dict)
    """Batch and lengths."""


def cache_sizes(models: Models, work: Workload) -> list[Measure]:
    """Parameters, and the bytes that the cache of one sequence holds after its prompt."""
    caches = {name: _cache(model, work) for name, model in models.items()}
    states = {name: _recurrent_states(cache) for name, cache in caches.items()}
    at = {"batch_size": 1, "length": work.prompt_length}
    prompt = f"{work.prompt_length} tokens"
    return [
        Measure(
            "parameters",
            "parameters",
            "",
            "lower",
            {name: Spread.counted(count_parameters(m.parameters())) for name, m in models.items()},
        ),
        Measure(
            "state_bytes",
            "recurrent state a sequence",
            "bytes",
            "lower",
            {name: Spread.counted(_bytes(found)) for name, found in states.items() if found},
            at,
        ),
        Measure(
            "cache_bytes",
            f"whole cache a sequence, after {prompt}",
            "bytes",
            "lower",
            {name: Spread.counted(_bytes(_tensors(cache))) for name, cache in caches.items()},
            at,
        ),
    ]


def prefill(models: Models, work: Workload) -> Iterator[Measure]:
    """Tokens a second at which one prompt of each length is read, and the memory of the longest."""
    for length in work.lengths:
        sizes = {"batch_size": 1, "length": length}
        with _enough_memory(f"a prompt of {length} tokens", "--lengths"):
            seconds = _times(models, partial(_reading, length=length, seed=work.seed), work.repeats)
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
        _peaks(models, partial(_reading, length=longest, seed=work.seed), _weights),
        {"batch_size": 1, "length": longest},
    )


def decode(models: Models, work: Workload) -> Iterator[Measure]:
    """Tokens a second over the batch, and milliseconds a step, of greedy cached decoding."""
    for batch_size in work.batch_sizes:
        with _enough_memory(f"decoding of {batch_size} sequences", "--batch-sizes"):
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


def mixer(models: Models, work: Workload) -> Iterator[Measure]:
    """Milliseconds of one token mixer alone, the first of the model, over the longest prompt."""
    mixers = {name: _first_mixer(model) for name, model in models.items()}
    found = {name: module for name, module in mixers.items() if module is not None}
    length = max(work.lengths)
    sizes = {"batch_size": 1, "length": length}
    for name, label, build in (
        ("mixer", "forward", _mixing),
        ("mixer_backward", "forward and backward", _mixing_back),
    ):
        if found:
            seconds = _times(found, partial(build, length=length), work.repeats)
            yield Measure(
                name,
                f"one mixer layer, {label}, {length:,} tokens",
                "ms",
                "lower",
                {key: Spread.milliseconds(times) for key, times in seconds.items()},
                sizes,
            )


def training(models: Models, work: Workload, compute: torch.dtype) -> Iterator[Measure]:
    """Milliseconds and peak memory of one training step: forward, backward, AdamW.

    The learning rate is 0, so the weights stay; they are fp32, and matrix products run in
    `compute` where that is narrower.
    """
    sizes = {"batch_size": work.train_batch, "length": work.train_length}
    where = f"{work.train_batch} × {work.train_length:,} tokens"
    steps = {name: TrainingStep(model, work, compute) for name, model in models.items()}
    with _enough_memory(f"a training step of {where}", "--train-batch or --train-length"):
        seconds = take_turns({n: step.timed for n, step in steps.items()}, work.repeats)
        peaks = {name: Spread.counted(step.peak_bytes()) for name, step in steps.items()}
    rows = {name: Spread.milliseconds(times) for name, times in seconds.items()}
    yield Measure("train_step", f"training step, {where}", "ms", "lower", rows, sizes)
    label = f"peak memory, training step, {where}"
    yield Measure("train_peak_bytes", label, "bytes", "lower", peaks, sizes)


class TrainingStep:
    """One step of AdamW on random tokens, again and again."""

    def __init__(self, model: nn.Module, work: Workload, compute: torch.dtype) -> None:
        self.model = model.train()
        self.compute = compute
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
        tokens = random_prompt(model, work.train_batch, work.train_length + 1, work.seed)
        self.inputs, self.labels = tokens[:, :-1].contiguous(), tokens[:, 1:].flatten()

    @property
    def device(self) -> torch.device:
        return self.inputs.device

    def __call__(self) -> None:
        narrow = self.compute != torch.float32
        with torch.autocast(self.device.type, self.compute, enabled=narrow):
            logits = self.model(input_ids=self.inputs, use_cache=False).logits
        cross_entropy(logits.flatten(0, 1).float(), self.labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def timed(self) -> float:
        return timed(self, self.device)

    def peak_bytes(self) -> int:
        """Weights, moments, and what a step holds on top of them; call after a first step."""
        moments = [v for state in self.optimizer.state.values() for v in state.values()]
        return _weights(self.model) + _bytes(moments) + peak_bytes(self, self.device)


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


def _times(
    models: Models, build: Callable[[nn.Module], Callable[[], object]], repeats: int
) -> dict[str, list[float]]:
    def timer(model: nn.Module) -> Callable[[], float]:
        action, device = build(model), _device(model)
        return lambda: timed(action, device)

    return take_turns({name: timer(model) for name, model in models.items()}, repeats)


def _peaks(
    models: Models,
    build: Callable[[nn.Module], Callable[[], object]],
    held: Callable[[nn.Module], int],
) -> dict[str, Spread]:
    return {
        name: Spread.counted(held(model) + peak_bytes(build(model), _device(model)))
        for name, model in models.items()
    }


def _reading(model: nn.Module, length: int, seed: int) -> Callable[[], object]:
    prompt = random_prompt(model, 1, length, seed)

    @torch.no_grad()
    def read() -> object:
        return model(input_ids=prompt, use_cache=True, logits_to_keep=1)

    return read


def _mixing(module: nn.Module, length: int) -> Callable[[], object]:
    hidden = _hidden(module, length)

    @torch.no_grad()
    def mix() -> object:
        return module(hidden)

    return mix


def _mixing_back(module: nn.Module, length: int) -> Callable[[], object]:
    hidden = _hidden(module, length).requires_grad_()

    def mix() -> None:
        module(hidden)[0].float().sum().backward()
        module.zero_grad()

    return mix


def _hidden(module: nn.Module, length: int) -> Tensor:
    weight = next(module.parameters())
    shape = (1, length, module.hidden_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(weight)


def _first_mixer(model: nn.Module) -> nn.Module | None:
    from pruning.adapters import ADAPTERS

    adapter = ADAPTERS.get(model.config.model_type)
    if adapter is None:
        return None
    module, name = adapter.mixer_class
    kind = getattr(import_module(module), name)
    return next((found for found in model.modules() if isinstance(found, kind)), None)


@torch.no_grad()
def _cache(model: nn.Module, work: Workload) -> Any:
    prompt = random_prompt(model, 1, work.prompt_length, work.seed)
    return model(input_ids=prompt, use_cache=True, logits_to_keep=1).past_key_values


def _recurrent_states(cache: Any) -> list[Tensor]:
    states = (getattr(layer, "state", None) or {} for layer in cache.layers)
    return [tensor for state in states for tensor in _tensors(state.get("recurrent_state"))]


def _tensors(value: Any) -> list[Tensor]:
    """The tensors anywhere in a cache, a layer of one, or a container."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [tensor for item in value.values() for tensor in _tensors(item)]
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in _tensors(item)]
    if hasattr(value, "layers"):
        return _tensors([vars(layer) for layer in value.layers])
    return []


def _weights(model: nn.Module) -> int:
    return _bytes([*model.parameters(), *model.buffers()])


def _bytes(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


@contextmanager
def _enough_memory(what: str, option: str) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(f"{what} needs more memory than the GPU has: lower {option}") from error
