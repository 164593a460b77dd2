"""One token mixer alone, forward and backward."""

from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module

import torch
from torch import Tensor, nn

from launch.speed.timing import Spread
from launch.speed.workload import Measure, Models, Workload, seconds_of


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
            seconds = seconds_of(found, partial(build, length=length), work.repeats)
            yield Measure(
                name,
                f"one mixer layer, {label}, {length:,} tokens",
                "ms",
                "lower",
                {key: Spread.milliseconds(times) for key, times in seconds.items()},
                sizes,
            )


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
