"""What a benchmark runs, and how it is timed: sizes, measures, and turns that models take."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from flame.errors import UserError
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
# At small batches decoding reads weights and launches kernels; at large ones it reads states.
ON_CUDA = Workload((1024, 4096, 16384), (1, 16, 64, 256, 1024), 64, 128, 4, 2048)


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


def seconds_of(
    models: Models, build: Callable[[nn.Module], Callable[[], object]], repeats: int
) -> dict[str, list[float]]:
    """Seconds of `repeats` runs of what `build` makes for each model; the models take turns."""

    def timer(model: nn.Module) -> Callable[[], float]:
        action, device = build(model), device_of(model)
        return lambda: timed(action, device)

    return take_turns({name: timer(model) for name, model in models.items()}, repeats)


def peaks_of(
    models: Models,
    build: Callable[[nn.Module], Callable[[], object]],
    held: Callable[[nn.Module], int],
) -> dict[str, Spread]:
    """Bytes at the peak of what `build` makes for each model, on top of those it holds anyway."""
    return {
        name: Spread.counted(held(model) + peak_bytes(build(model), device_of(model)))
        for name, model in models.items()
    }


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the parameters and buffers of a model."""
    return bytes_of([*model.parameters(), *model.buffers()])


def bytes_of(tensors: list[Tensor]) -> int:
    """Bytes of some tensors together."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def device_of(model: nn.Module) -> torch.device:
    """The device that a model lies on."""
    return next(model.parameters()).device


@contextmanager
def enough_memory(what: str, option: str) -> Iterator[None]:
    """Turn a lack of GPU memory into a UserError that names the `option` to lower."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(f"{what} needs more memory than the GPU has: lower {option}") from error
