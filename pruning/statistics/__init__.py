"""Statistics: sums over calibration data, one file for each family of them."""

from pruning.statistics.gate_moments import GateInput, GateMoments
from pruning.statistics.gradients import GradientShare, Shard, WeightGradientProducts
from pruning.statistics.grams import NormalisedGrams, QueryKeyGram, QueryKeySample
from pruning.statistics.interface import Source, Statistic
from pruning.statistics.norms import InputSquares, KeySquares, ValueSquares
from pruning.statistics.output_equations import OutputEquations, OutputPair
from pruning.statistics.output_errors import (
    HeadOutputErrors,
    KeyOutputErrors,
    ValueOutputErrors,
)
from pruning.statistics.outputs import HeadOutputGram, OutputSquares
from pruning.statistics.states import StateSpectra

__all__ = [
    "GateInput",
    "GateMoments",
    "GradientShare",
    "HeadOutputErrors",
    "HeadOutputGram",
    "InputSquares",
    "KeyOutputErrors",
    "KeySquares",
    "NormalisedGrams",
    "OutputEquations",
    "OutputPair",
    "OutputSquares",
    "QueryKeyGram",
    "QueryKeySample",
    "Shard",
    "Source",
    "StateSpectra",
    "Statistic",
    "ValueOutputErrors",
    "ValueSquares",
    "WeightGradientProducts",
]
