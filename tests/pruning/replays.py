"""Replays of calls by hand, and what they should find, from layers with zeros."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from pruning.adapters import ADAPTERS
from pruning.mixers import find_mixers
from pruning.op_call import OpCall
from pruning.replay import Replay
from pruning.spaces import Space, dropped_positions
from pruning.taps import operator_for


class Norm(nn.Module):
    """An output norm without a weight, and its gate."""

    def forward(self, o: Tensor, gate: Tensor) -> Tensor:
        return o * (o.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * torch.sigmoid(gate)


def replay_of(call: OpCall, seed: int = 0) -> Replay:
    """A replay of a call's queries and keys with random values, β, gate and output projection."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(call.v.shape, generator=generator)
    beta = torch.rand(call.beta.shape, generator=generator)
    call = replace(call, v=values, beta=beta, g=None)
    gate = torch.randn(values.shape, generator=generator)
    weight = torch.randn(10, values.shape[2:].numel(), generator=generator)
    outputs = torch.randn(call.tokens, weight.shape[1], generator=generator)
    return Replay(call, operator_for(ADAPTERS["delta_net"]), Norm(), (gate,), weight, outputs)


@torch.no_grad()
def changes(model: nn.Module, space: Space, head: int, args: tuple, kwargs: dict) -> Tensor:
    """What the layer's output loses with each channel of a head, [d, T, hidden]."""
    mixer = find_mixers(model, ADAPTERS[model.config.model_type])[space.layer]
    whole, found = _output(mixer, args, kwargs), []
    for channel in range(space.head_dim):
        kept = [torch.arange(space.head_dim) for _ in range(space.num_heads)]
        kept[head] = kept[head][kept[head] != channel]
        saved = {axis.fqn: model.get_parameter(axis.fqn).clone() for axis in space.axes}
        for axis in space.axes:
            if axis.role == "projection":
                dropped = dropped_positions(axis, tuple(kept))
                model.get_parameter(axis.fqn).index_fill_(axis.dim, dropped, 0)
        found.append(_output(mixer, args, kwargs) - whole)
        for fqn, tensor in saved.items():
            model.get_parameter(fqn).copy_(tensor)
    return torch.stack(found)


def _output(mixer: nn.Module, args: tuple, kwargs: dict) -> Tensor:
    out = mixer(*args, **kwargs)
    return (out[0] if isinstance(out, tuple) else out)[0]
