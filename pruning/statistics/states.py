"""Ranks and norms of recurrent states, over many states."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from pruning.spaces import Kind
from pruning.state_rank import shares, singular_values
from pruning.statistics.interface import Source, Statistic

BINS_PER_DECADE = 100
DECADES = 12
"""Singular values below 1e-12 of the largest are counted together."""
BINS = DECADES * BINS_PER_DECADE + 1


@dataclass
class StateSpectra(Statistic):
    """For each key head, one channel of a head space, the nuclear norms of its states and how
    their singular values fall off.

    A histogram of -log10(sigma_i / sigma_1), so that the epsilon of the threshold rank can be
    chosen afterwards, to a hundredth of a decade. Under grouped value heads a key head has several
    states at a time, and all of them count.
    """

    source: ClassVar[Source] = Source.STATE
    kinds: ClassVar[tuple[Kind, ...]] = ("head",)

    histogram: Int64[Tensor, f"d {BINS}"]
    """Singular values in each hundredth of a decade below the largest; the last bin has the rest,
    and all values of a state of zeros."""
    nuclear_norm: Float64[Tensor, " d"]
    states: Int64[Tensor, ""]
    """States summed for each head."""

    def update(self, seen: Float[Tensor, "n HV K V"]) -> None:
        """Add n states of each value head to the sums of the key head that it belongs to.

        The sums are the nuclear norm and the histogram; `states` grows by n · HV / d, with d key
        heads. Every state takes one SVD.
        """
        heads = len(self.nuclear_norm)
        values = singular_values(seen).unflatten(1, (heads, -1)).transpose(0, 1).flatten(1, 2)
        self.nuclear_norm += values.sum((1, 2))
        bins = _bins(values).flatten(1)
        self.histogram.scatter_add_(1, bins, torch.ones_like(bins))
        self.states += values.shape[1]

    def threshold_rank(self, epsilon: float) -> Float64[Tensor, " d"]:
        """The mean number of singular values above `epsilon`, snapped to the bins, of the largest.

        Raises:
            ValueError: epsilon is not between 1e-12 and 1.
        """
        below = self.histogram[:, : epsilon_bin(epsilon)].sum(1)
        return below.double() / self.states

    def dimension(self) -> Float64[Tensor, " d"]:
        """Singular values of a state: min(d_k, d_v)."""
        return self.histogram.sum(1).double() / self.states


def epsilon_bin(epsilon: float) -> int:
    """How many bins lie above `epsilon`; ValueError unless it is within the histogram."""
    if not 10.0**-DECADES <= epsilon < 1:
        raise ValueError(f"epsilon is {epsilon}: give at least 1e-{DECADES} and less than 1")
    return max(round(-math.log10(epsilon) * BINS_PER_DECADE), 1)


def _bins(values: Float64[Tensor, "... d"]) -> Int64[Tensor, "... d"]:
    decades = -shares(values).log10()
    return (decades * BINS_PER_DECADE).clamp(0, DECADES * BINS_PER_DECADE).long()
