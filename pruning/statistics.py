"""Statistics: sums over calibration tokens from which methods choose channels.

A statistic is a dataclass whose tensor fields are all sums, so those of disjoint shards of the data
add up to those of the whole. That one property is why merging, reducing over processes, saving and
resuming are written once, here, for all of them. Nothing is normalised inside a statistic: means,
ratios and factorisations belong to the method.

Floating-point sums are float64, and a batch's contribution is computed in float64 too: what
another order of the same additions changes then lies below the resolution of the methods, so
that a plan does not depend on the number of processes.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any, ClassVar, Self

import torch
import torch.distributed as dist
from jaxtyping import Float64, Int64
from torch import Tensor

from flame.errors import UserError
from pruning.spaces import Kind, Space
from pruning.taps import OpCall


class Source(Enum):
    """What a statistic is fed with; only the last needs a backward pass."""

    OP = "op"
    """The delta-rule call, an `OpCall`."""
    MIXER_INPUT = "mixer input"
    """The hidden states that enter the token mixer, [tokens, hidden]."""
    STATE = "state"
    """Recurrent states, key dimension first: [..., d_k, d_v]."""
    WEIGHT_GRADIENT = "weight gradient"
    """Gradients of the tensors of a space's axes, by name."""


@dataclass
class Statistic(ABC):
    """Base of all statistics: a subclass declares tensor fields, `source`, `zeros` and `update`."""

    source: ClassVar[Source]
    kinds: ClassVar[tuple[Kind, ...]] = ("key",)
    """The kinds of spaces that it is summed for."""

    @classmethod
    @abstractmethod
    def zeros(cls, space: Space, device: torch.device | str = "cpu") -> Self:
        """The statistic of `space` before any token."""

    @abstractmethod
    def update(self, seen: Any) -> None:
        """Add what one tap delivered; padding must be gone by then."""

    def merge_(self, other: Self) -> Self:
        """Add the sums of another shard of the data, and return self."""
        for name, total in self.state_dict().items():
            total += getattr(other, name).to(total.device)
        return self

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


@dataclass
class QueryKeyGram(Statistic):
    """Per key head, the Gram matrix of queries stacked on keys: the sum of q qᵀ + k kᵀ.

    It is MᵀM of the paper's M = [Q; K] (arXiv 2602.04852), whatever the number of its rows, in
    d² numbers a head.
    """

    source: ClassVar[Source] = Source.OP

    gram: Float64[Tensor, "H d d"]
    """Sum of outer products of queries and of keys, after conv and activation, before L2 norm."""
    tokens: Int64[Tensor, ""]
    """Number of tokens summed."""

    @classmethod
    def zeros(cls, space: Space, device: torch.device | str = "cpu") -> Self:
        """Zero sums for the key heads of `space`."""
        shape = (space.num_heads, space.head_dim, space.head_dim)
        return cls(
            gram=torch.zeros(shape, dtype=torch.float64, device=device),
            tokens=torch.zeros((), dtype=torch.int64, device=device),
        )

    def update(self, seen: OpCall) -> None:
        """Add the tokens of one delta-rule call; cost 4 tokens d² per head, in float64.

        Raises:
            UserError: q or k has a NaN or an infinity; nothing is added.
        """
        contribution = _gram(seen.q) + _gram(seen.k)
        if not bool(contribution.isfinite().all()):
            raise UserError(_not_finite(seen))
        self.gram += contribution
        self.tokens += seen.q.shape[0] * seen.q.shape[1]


def _gram(x: Tensor) -> Float64[Tensor, "H d d"]:
    rows = x.detach().flatten(0, 1).transpose(0, 1).double()
    return rows.mT @ rows


def _not_finite(seen: OpCall) -> str:
    name = "q" if not bool(seen.q.isfinite().all()) else "k"
    return (
        f"layer {seen.layer}: {name} holds a NaN or an infinity at the tap of the delta-rule call: "
        f"check the model's weights and the precision that calibration runs in"
    )
