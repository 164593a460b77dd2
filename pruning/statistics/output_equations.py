"""The normal equations by which a pruned layer's output projection is fitted to the dense layer."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float, Float64, Int64
from torch import Tensor

from pruning.spaces import Kind
from pruning.statistics.interface import Source, Statistic


@dataclass
class OutputPair:
    """What a layer gives to its output projection, dense and pruned, for the same inputs."""

    dense: Float[Tensor, "n out"]
    pruned: Float[Tensor, "n out"]
    """At the dense layer's positions; zeros where the pruned layer has none."""


@dataclass
class OutputEquations(Statistic):
    """Per layer, Σ z' z'ᵀ and Σ z z'ᵀ for what dense (z) and pruned (z') layer give.

    One for each head space, of which every layer has one. Memory: 2 · out² numbers a layer.
    """

    source: ClassVar[Source] = Source.OUTPUT_PAIR
    kinds: ClassVar[tuple[Kind, ...]] = ("head",)

    gram: Float64[Tensor, "out out"]
    """Σ z' z'ᵀ."""
    cross: Float64[Tensor, "out out"]
    """Σ z z'ᵀ."""
    tokens: Int64[Tensor, ""]
    """Number of tokens summed."""

    def update(self, seen: OutputPair) -> None:
        """Add some tokens; cost 4 tokens out², in float64."""
        pruned = seen.pruned.double()
        self.gram.addmm_(pruned.mT, pruned)
        self.cross.addmm_(seen.dense.double().mT, pruned)
        self.tokens += len(pruned)
