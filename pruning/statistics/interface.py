"""What a statistic is: sums, from which methods choose channels.

A statistic is a dataclass whose tensor fields are all sums, so those of disjoint parts of what it
sums over add up to those of the whole. That one property is why merging, reducing over processes,
saving and resuming are written once, here, for all of them. Nothing is normalised inside a
statistic: means, ratios and factorisations belong to the method.

Floating-point sums are float64, and a batch's contribution is computed in float64 too, or in short
pieces of a sequence where a device is slow at that (`pruning.statistics.products`): what another
order of the same additions changes then lies below the resolution of the methods, so that a plan
does not depend on the number of processes. Whoever feeds a statistic sees to it that
only finite numbers come (`pruning.calibration.collect` names what does not).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any, ClassVar, Self, get_origin, get_type_hints

import torch
import torch.distributed as dist
from torch import Tensor

from pruning.spaces import Kind, Space, output_axis


class Source(Enum):
    """What a statistic is fed with; only the last needs a backward pass."""

    OP = "op"
    """The delta-rule call, an `OpCall`."""
    MIXER_INPUT = "mixer input"
    """The hidden states that enter the token mixer, [tokens, hidden]."""
    OUTPUT = "output"
    """What enters the output projection, after norm and gate: [tokens, value heads * d_v]."""
    OUTPUT_PAIR = "output pair"
    """An `OutputPair`: the same of a dense layer and of its pruned form, for the same inputs."""
    REPLAY = "replay"
    """A `Replay`: the layer's pass over some tokens, which can be repeated without channels."""
    GATE_INPUT = "gate input"
    """What enters the second projection of a low-rank gate, a `GateInput`."""
    STATE = "state"
    """Recurrent states, key dimension first: [n, value heads, d_k, d_v]."""
    WEIGHT_GRADIENT = "weight gradient"
    """`GradientShare`: this process's share of the weights with their gradients, once, at the end.
    It is a sum over entries of the weights and not over tokens."""


@dataclass
class Statistic(ABC):
    """Base of all statistics: a subclass declares tensor fields, `source` and `update`.

    The annotation of a field says its dtype (float64 sums or int64 counts) and its shape: `H` heads
    and `d` channels of the space, `Hd` channels of all its heads, `hidden` numbers that enter the
    mixer, `out` that enter the output projection, `block` of these for each channel, or a number.
    One field without dimensions counts what was summed.
    """

    source: ClassVar[Source]
    kinds: ClassVar[tuple[Kind, ...]] = ("key",)
    """The kinds of spaces that it is summed for."""

    @classmethod
    def zeros(cls, space: Space, hidden_size: int = 0, device: torch.device | str = "cpu") -> Self:
        """The statistic of `space` before any token.

        Args:
            space: the channels that it is of.
            hidden_size: numbers of a token that enter the mixer.
            device: where the sums are.
        """
        channels = space.num_heads * space.head_dim
        sizes = {"H": space.num_heads, "d": space.head_dim, "Hd": channels, "hidden": hidden_size}
        if cls.source in (Source.OUTPUT, Source.OUTPUT_PAIR):
            size = output_axis(space).layout.size
            sizes |= {"out": size, "block": size // channels}
        sums = {}
        for name, hint in get_type_hints(cls).items():
            if name in cls.__dataclass_fields__ and get_origin(hint) is not ClassVar:
                shape = [sizes.get(d) or int(d) for d in hint.dim_str.split()]
                dtype = torch.int64 if "int64" in hint.dtypes else torch.float64
                sums[name] = torch.zeros(shape, dtype=dtype, device=device)
        return cls(**sums)

    @property
    def is_empty(self) -> bool:
        """Whether nothing has been summed yet."""
        return not any(int(x) for x in self.state_dict().values() if x.ndim == 0)

    @abstractmethod
    def update(self, seen: Any) -> None:
        """Add what one tap delivered: finite, and without padding."""

    def all_reduce_(self, group: dist.ProcessGroup | None = None) -> Self:
        """Add up the sums of all ranks of `group`, on every rank, and return self.

        Collective. Without a process group there is one shard, and nothing to add.
        """
        if dist.is_initialized():
            for total in self.state_dict().values():
                dist.all_reduce(total, group=group)
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """The sums by field name; the tensors are the statistic's own, not copies."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace the sums in place by saved ones of the same names, shapes and dtypes."""
        own = self.state_dict()
        if own.keys() != state.keys():
            raise ValueError(
                f"{type(self).__name__} has the sums {sorted(own)}, the saved state {sorted(state)}"
            )
        for name, total in own.items():
            saved = state[name]
            if saved.shape != total.shape or saved.dtype != total.dtype:
                raise ValueError(
                    f"{type(self).__name__}.{name} is {total.dtype} {list(total.shape)}, "
                    f"the saved one {saved.dtype} {list(saved.shape)}"
                )
            total.copy_(saved)
