"""What decoding keeps for a sequence: parameters, recurrent states, whole caches."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flame.model import count_parameters
from launch.speed.decoding import random_prompt
from launch.speed.timing import Spread
from launch.speed.workload import Measure, Models, Workload, bytes_of


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
            {name: Spread.counted(bytes_of(found)) for name, found in states.items() if found},
            at,
        ),
        Measure(
            "cache_bytes",
            f"whole cache a sequence, after {prompt}",
            "bytes",
            "lower",
            {name: Spread.counted(bytes_of(tensors_in(cache))) for name, cache in caches.items()},
            at,
        ),
    ]


@torch.no_grad()
def _cache(model: nn.Module, work: Workload) -> Any:
    prompt = random_prompt(model, 1, work.prompt_length, work.seed)
    return model(input_ids=prompt, use_cache=True, logits_to_keep=1).past_key_values


def _recurrent_states(cache: Any) -> list[Tensor]:
    """The states in a cache of fla's models (`state`) or of transformers' (`recurrent_states`)."""
    of_fla = (getattr(layer, "state", None) or {} for layer in cache.layers)
    held = [state.get("recurrent_state") for state in of_fla]
    held += [getattr(layer, "recurrent_states", None) for layer in cache.layers]
    return [tensor for each in held for tensor in tensors_in(each)]


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors anywhere in a cache, a layer of one, or a container."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [tensor for item in value.values() for tensor in tensors_in(item)]
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in tensors_in(item)]
    if hasattr(value, "layers"):
        return tensors_in([vars(layer) for layer in value.layers])
    return []
