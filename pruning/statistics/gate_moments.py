"""Second moments inside a layer's low-rank gates, by which a narrower gate is fitted."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float, Float64, Int64
from torch import Tensor

from pruning.spaces import Kind
from pruning.statistics.interface import Source, Statistic


@dataclass
class GateInput:
    """What one gate of a layer gives from its first projection to its second."""

    gate: int
    """0 for the decay's, 1 for the output's."""
    inner: Float[Tensor, "n d"]


@dataclass
class GateMoments(Statistic):
    """Per layer, Σ u uᵀ of the inner channels u of its two low-rank gates.

    One for each value space, of which every layer has one: the inner width d is the head's.
    """

    source: ClassVar[Source] = Source.GATE_INPUT
    kinds: ClassVar[tuple[Kind, ...]] = ("value",)

    moments: Float64[Tensor, "2 d d"]
    """Of the decay's gate and of the output's."""
    tokens: Int64[Tensor, ""]
    """Number of tokens summed."""

    def update(self, seen: GateInput) -> None:
        """Add some tokens of one gate; cost 2 n d², in float64."""
        inner = seen.inner.double()
        self.moments[seen.gate].addmm_(inner.mT, inner)
        if seen.gate == 0:
            self.tokens += len(inner)
