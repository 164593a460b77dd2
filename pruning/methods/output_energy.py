"""Output energy: keep the heads that add most to the layer's output."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float64
from torch import Tensor

from pruning.methods.interface import Statistics, Weights, summed
from pruning.methods.scoring import ScoringMethod
from pruning.spaces import HEAD_KINDS, Kind, Space, output_axis
from pruning.statistics import HeadOutputGram, Statistic


@dataclass(frozen=True)
class OutputEnergy(ScoringMethod):
    """Score of a head, a group or a value head: the mean over tokens of ‖W z‖².

    z is what it hands to the output projection, after norm and gate, and W its columns there: so
    the score is the square of what the layer's output loses without it. It counts each head by
    itself, not what several of them share. It has no paper of its own.
    """

    name: ClassVar[str] = "output-energy"
    kinds: ClassVar[tuple[Kind, ...]] = HEAD_KINDS
    needs: ClassVar[tuple[type[Statistic], ...]] = (HeadOutputGram,)

    def channel_scores(
        self, space: Space, weights: Weights, statistics: Statistics
    ) -> Float64[Tensor, "H d"]:
        """Mean squares, in float64."""
        statistic = summed(statistics, HeadOutputGram, space, self)
        gram = statistic.gram.cpu().flatten(0, 1) / statistic.tokens.cpu()
        weight = weights[output_axis(space).fqn].detach().cpu().double()
        columns = weight.unflatten(1, gram.shape[:2]).transpose(0, 1)
        found = torch.einsum("hoi,hij,hoj->h", columns, gram, columns)
        return found.unflatten(0, (space.num_heads, space.head_dim))
