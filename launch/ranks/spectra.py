"""Singular values of recurrent states: how many of their directions the states use.

Importing this module imports no torch, so that a report can name its types.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from pruning.states.analysis import Analysis


@dataclass(frozen=True)
class Spectrum:
    """Singular values of one layer's recurrent states, each state's divided by its largest."""

    layer: int
    values: Sequence[float]
    """Mean over sequences and heads, decreasing from 1; min(d_k, d_v) of them."""

    stable_rank: float = math.nan
    """Mean over sequences and heads of ‖S‖_F² / ‖S‖_2²."""


def spectra_of(analysis: "Analysis") -> list[Spectrum]:
    """The spectra, by layer, of the states that a rank analysis ended with."""
    return [
        mean_spectrum(layer, values.flatten(0, 1))
        for layer, values in zip(analysis.layers, analysis.spectra, strict=True)
    ]


def mean_spectrum(layer: int, values: "Tensor") -> Spectrum:
    """The spectrum of one layer from singular values [states, d] in decreasing order."""
    from pruning.state_rank import measure, shares

    return Spectrum(
        layer, shares(values).mean(0).tolist(), float(measure(values).stable_rank.mean())
    )
