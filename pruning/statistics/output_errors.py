"""What a layer's output loses without single channels, and how these losses add up.

y_t is the layer's output for token t and δ_{j,t} its change when channel j is zero. To first order
in the set, the output without a set D of channels changes by the sum of their δ, so its squared
error is the sum of `gram[i, j]` over i and j in D. The changes are measured by running the layer
again without the channel (`pruning.replay`): scores that hold the state fixed miss that the other
channels of a key are normalised anew and that the state then evolves differently.
"""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float, Float64, Int64
from torch import Tensor

from pruning.replay import Replay
from pruning.spaces import HEAD_KINDS, Kind
from pruning.statistics.interface import Source, Statistic

TOKENS_AT_ONCE = 512
"""Tokens whose changes are held in float64 together."""


@dataclass
class KeyOutputErrors(Statistic):
    """Per key head, the products Σ_t ⟨δ_{i,t}, δ_{j,t}⟩ of the output's changes without a channel.

    With grouped value heads a change is that of the sum of the group's outputs.
    """

    source: ClassVar[Source] = Source.REPLAY
    kinds: ClassVar[tuple[Kind, ...]] = ("key",)

    gram: Float64[Tensor, "H d d"]
    tokens: Int64[Tensor, ""]
    """Number of tokens summed."""

    def update(self, seen: Replay) -> None:
        """Add some tokens: d + 1 runs of the operator for every head, and 2 d (d + w) w each.

        w is the number of value channels of the head's group.
        """
        columns = seen.weight.double().unflatten(1, (seen.heads, -1))
        for head, of_head in enumerate(columns.unbind(1)):
            changes = seen.without_key_channels(head)
            add_products_(self.gram[head], changes, of_head.mT @ of_head)
        self.tokens += seen.call.tokens


@dataclass
class ValueOutputErrors(Statistic):
    """The same of value channels, each removed in all heads of the layer at a time."""

    source: ClassVar[Source] = Source.REPLAY
    kinds: ClassVar[tuple[Kind, ...]] = ("value",)

    gram: Float64[Tensor, "H d d"]
    """A value space has one row of channels, so H is 1."""
    tokens: Int64[Tensor, ""]
    """Number of tokens summed."""

    def update(self, seen: Replay) -> None:
        """Add some tokens; the delta rule runs once more, without any channel set to zero."""
        weight = seen.weight.double()
        for changes in seen.without_value_channels():
            add_products_(self.gram[0], changes, weight.mT @ weight)
        self.tokens += seen.call.tokens


@dataclass
class HeadOutputErrors(Statistic):
    """The same of heads, groups of them or value heads: without one the output loses its part.

    Parts add up, so the error of a set is exact. All heads of a layer are in one matrix.
    """

    source: ClassVar[Source] = Source.REPLAY
    kinds: ClassVar[tuple[Kind, ...]] = HEAD_KINDS

    gram: Float64[Tensor, "Hd Hd"]
    tokens: Int64[Tensor, ""]
    """Number of tokens summed."""

    def update(self, seen: Replay) -> None:
        """Add some tokens; nothing runs again."""
        heads = len(self.gram)
        columns = seen.weight.double().unflatten(1, (heads, -1)).transpose(0, 1)
        for outputs in seen.outputs.split(TOKENS_AT_ONCE):
            of_heads = outputs.double().unflatten(1, (heads, -1)).transpose(0, 1)
            parts = (of_heads @ columns.mT).flatten(1)
            self.gram.addmm_(parts, parts.mT)
        self.tokens += seen.call.tokens


def add_products_(
    gram: Float64[Tensor, "d d"], changes: Float[Tensor, "d n w"], metric: Float64[Tensor, "w w"]
) -> None:
    """Add the products of the changes' rows in `metric`, summed over tokens, in float64."""
    for part in changes.split(TOKENS_AT_ONCE, 1):
        rows = part.double()
        gram.addmm_((rows @ metric).flatten(1), rows.flatten(1).mT)
