"""Singular values of a model's recurrent states: how many of their directions the states use.

Importing this module imports no torch, so that a report can name its types.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flame.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pruning.states.analysis import Analysis


@dataclass(frozen=True)
class Spectrum:
    """Singular values of one layer's recurrent states, each state's divided by its largest."""

    layer: int
    values: Sequence[float]
    """Mean over sequences and heads, decreasing from 1; min(d_k, d_v) of them."""

    stable_rank: float = math.nan
    """Mean over sequences and heads of ‖S‖_F² / ‖S‖_2²."""


def state_spectra(model: "nn.Module", tokens: "Tensor") -> list[Spectrum]:
    """Spectra of the states that `model` has after reading `tokens`, by layer.

    Layers without a matrix state (softmax attention) have no entry.

    Args:
        model: a causal language model of transformers or fla that keeps states in its cache.
        tokens: int64 [B, T], one text a row.

    Raises:
        UserError: a layer's states are not finite.
    """
    return [_spectrum(layer, states) for layer, states in recurrent_states(model, tokens)]


def spectra_of(analysis: "Analysis") -> list[Spectrum]:
    """The spectra, by layer, of the states that a rank analysis ended with."""
    return [
        mean_spectrum(layer, values.flatten(0, 1))
        for layer, values in zip(analysis.layers, analysis.spectra, strict=True)
    ]


def recurrent_states(model: "nn.Module", tokens: "Tensor") -> "list[tuple[int, Tensor]]":
    """(layer, states [B, H, d, d']) after `tokens` [B, T]; a state may be keys or values first."""
    import torch

    with torch.no_grad():
        cache = model(input_ids=tokens, use_cache=True, logits_to_keep=1).past_key_values
    return [(layer, state) for layer, state in _cached(cache) if state.dim() == 4]


def _cached(cache: Any) -> "Iterator[tuple[int, Tensor]]":
    import torch

    for number, layer in enumerate(cache.layers):
        state = getattr(layer, "state", None) or {}
        if isinstance(state.get("recurrent_state"), torch.Tensor):
            yield number, state["recurrent_state"]


def _spectrum(layer: int, states: "Tensor") -> Spectrum:
    import torch

    from pruning.state_rank import singular_values

    if not torch.isfinite(states).all():
        raise UserError(f"layer {layer}: the recurrent states are not finite: check the weights")
    return mean_spectrum(layer, singular_values(states).flatten(0, 1))


def mean_spectrum(layer: int, values: "Tensor") -> Spectrum:
    """The spectrum of one layer from singular values [states, d] in decreasing order."""
    from pruning.state_rank import measure, shares

    return Spectrum(
        layer, shares(values).mean(0).tolist(), float(measure(values).stable_rank.mean())
    )
