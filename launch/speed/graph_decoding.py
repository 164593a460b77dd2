"""Speed of decoding as one CUDA graph a token, which leaves out the launches of single kernels.

A graph replays fixed addresses, so the cache is updated in place: each layer's new state is copied
into the tensor that held the old one, at once, so that no second set of states is kept. Only caches
of fixed shapes can be: those of fla's linear-attention layers.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from launch.speed.decoding import random_prompt
from launch.speed.timing import timed

WARM_UP = 3
"""Steps before capture, which compile and choose kernels."""


class NoGraphError(Exception):
    """A model's decoding cannot be one graph; the message says why."""


def graph_seconds(
    model: nn.Module, batch_size: int, length: int, prompt_length: int, seed: int, repeats: int
) -> list[float]:
    """Return the seconds of `repeats` greedy decodings of `length` tokens, after one not counted.

    Raises:
        NoGraphError: the model does not lie on a GPU, or its cache has no fixed shapes.
    """
    prompt = random_prompt(model, batch_size, prompt_length, seed)
    if prompt.device.type != "cuda":
        raise NoGraphError("CUDA graphs need a GPU")
    decoding = StaticDecoding(model, prompt)
    replay = captured(decoding.step, prompt.device)

    def decode() -> None:
        for _ in range(length):
            replay()

    return [timed(decode, prompt.device) for _ in range(repeats + 1)][1:]


def captured(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Run `step` some times on a side stream, capture it, and return what replays it."""
    side, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            step()
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


class StaticDecoding:
    """Greedy decoding of one token a step, with every tensor that outlives a step at one address.

    Raises:
        NoGraphError: the cache is not fla's. A step raises it where a tensor of the cache grows.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, prompt: Tensor) -> None:
        self.model = model
        output = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
        self.cache = output.past_key_values
        self.token = output.logits[:, -1].argmax(-1, keepdim=True)
        """The last token of each sequence, int64 [B, 1]."""
        for layer in self.cache.layers:
            update_in_place(layer)

    @torch.no_grad()
    def step(self) -> None:
        """Read `token` and replace it by the next."""
        output = self.model(input_ids=self.token, past_key_values=self.cache, use_cache=True)
        self.token.copy_(output.logits[:, -1].argmax(-1, keepdim=True))


def update_in_place(layer: Any) -> None:
    """Make a layer of fla's cache copy what it is given into the tensors that it holds."""
    if not isinstance(getattr(layer, "state", None), Mapping):
        raise NoGraphError("its cache is not one of fla's, with states of fixed shape")
    update = layer.update

    def updated(**new: Any) -> Any:
        held = dict(layer.state)
        layer.state = _copied(held, update(**new))
        return layer.state

    layer.update = updated


def _copied(held: Any, new: Any) -> Any:
    """Copy the tensors of `new` into those of `held`, which has the same structure; return it."""
    if isinstance(held, Tensor):
        if held.shape != new.shape:
            raise NoGraphError("its cache grows with the text (softmax attention)")
        return held if held is new else held.copy_(new)
    if isinstance(held, Mapping):
        return {key: _copied(value, new[key]) for key, value in held.items()}
    if isinstance(held, list | tuple):
        return type(held)(_copied(own, other) for own, other in zip(held, new, strict=True))
    return new
