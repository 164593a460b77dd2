"""What a layer's output loses without single channels, and how these losses add up.

y_t is the layer's output for token t and δ_{j,t} its change when channel j is zero. To first order
in the set, the output without a set D of channels changes by the sum of their δ, so its squared
error is the sum of `gram[i, j]` over i and j in D. The changes are measured by running the layer
again without the channel (`pruning.replay`): scores that hold the state fixed miss that the other
channels of a key are normalised anew and that the state then evolves differently.

A change δ of what enters the output projection W weighs ‖W δ‖ = ‖R δ‖, with W = Q R: R has as many
rows as δ has entries, or fewer, and no square of W's condition. Where outer products are summed in
pieces, R δ is made in float32 too. Its w-long sums round by at most (w + 2) u |R| |δ| each,
u = 2^-24; so, beside what pieces round, an entry of the sum differs by at most

    e_i g_j + g_i e_j + e_i e_j

with g_i the length of R δ_i over all tokens and e_i that of (w + 2) u |R| |δ_i|.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from pruning.replay import Replay
from pruning.spaces import HEAD_KINDS, Kind
from pruning.statistics.interface import Source, Statistic
from pruning.statistics.products import (
    AddProducts,
    SumOfProducts,
    add_products_,
    ieee_products,
)

TOKENS_AT_ONCE = 512
"""Tokens whose changes are held in float64 together."""


@dataclass
class KeyOutputErrors(SumOfProducts, Statistic):
    """Per key head, the products Σ_t ⟨δ_{i,t}, δ_{j,t}⟩ of the output's changes without a channel.

    With grouped value heads a change is that of the sum of the group's outputs.
    """

    source: ClassVar[Source] = Source.REPLAY
    kinds: ClassVar[tuple[Kind, ...]] = ("key",)

    gram: Float64[Tensor, "H d d"]
    tokens: Int64[Tensor, ""]
    """Number of tokens summed."""

    def update(self, seen: Replay) -> None:
        """Add some tokens: d + 1 runs of the operator for every head, and 2 d (d + w) w a token.

        w is the number of value channels of the head's group.
        """
        columns = seen.weight.double().unflatten(1, (seen.heads, -1))
        for head, of_head in enumerate(columns.unbind(1)):
            changes = seen.without_key_channels(head)
            add_changes_(self.add_products_, self.gram[head], changes, root(of_head))
        self.tokens += seen.call.tokens


@dataclass
class ValueOutputErrors(SumOfProducts, Statistic):
    """The same of value channels, each removed in all heads of the layer at a time."""

    source: ClassVar[Source] = Source.REPLAY
    kinds: ClassVar[tuple[Kind, ...]] = ("value",)

    gram: Float64[Tensor, "H d d"]
    """A value space has one row of channels, so H is 1."""
    tokens: Int64[Tensor, ""]
    """Number of tokens summed."""

    def update(self, seen: Replay) -> None:
        """Add some tokens; the delta rule runs once more, without any channel set to zero."""
        factor = root(seen.weight.double())
        for changes in seen.without_value_channels():
            add_changes_(self.add_products_, self.gram[0], changes, factor)
        self.tokens += seen.call.tokens


@dataclass
class HeadOutputErrors(SumOfProducts, Statistic):
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
            parts = of_heads @ columns.mT
            self.add_products_(self.gram[None], parts.permute(1, 2, 0).unsqueeze(2))
        self.tokens += seen.call.tokens


def root(weight: Float64[Tensor, "hidden w"]) -> Float64[Tensor, "r w"]:
    """R with RᵀR = `weight`ᵀ `weight`, and at most w rows."""
    return torch.linalg.qr(weight, mode="r").R


def add_changes_(
    add: AddProducts,
    gram: Float64[Tensor, "d d"],
    changes: Float[Tensor, "d n w"],
    factor: Float64[Tensor, "r w"],
) -> None:
    """Add the products of the changes' rows times `factor`ᵀ, summed over tokens, by `add`."""
    wide = torch.float64 if add is add_products_ else torch.float32
    for part in changes.split(TOKENS_AT_ONCE, 1):
        with ieee_products():
            rows = part.to(wide) @ factor.to(wide).mT
        add(gram[None], rows.permute(1, 2, 0).unsqueeze(2))
