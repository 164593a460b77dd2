"""Spectra of the states: right on known matrices, and bounded by the tokens that were read."""

import subprocess
import sys
from typing import Any

import pytest
import torch

from launch.ranks.spectra import Spectrum, mean_spectrum
from launch.speed.decoding import random_prompt
from pruning.state_rank import singular_values
from tests.launch.speed.test_decoding import FAMILIES, stock_model
from tests.pruning.models import recurrent_states

LINEAR = [family for family in sorted(FAMILIES) if family != "llama"]


def spectrum(layer: int, states: torch.Tensor) -> Spectrum:
    """The spectrum of states [B, H, d, d']."""
    return mean_spectrum(layer, singular_values(states).flatten(0, 1))


def test_spectrum_of_known_states() -> None:
    states = torch.stack(
        [torch.diag(torch.tensor([4.0, 2.0])), torch.diag(torch.tensor([0.0, 8.0]))]
    )
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]])
    found = spectrum(5, (turn @ states)[None])
    assert found.layer == 5
    assert found.values == pytest.approx([1.0, 0.25], abs=1e-7)
    assert found.stable_rank == pytest.approx((1.25 + 1.0) / 2, abs=1e-7)


def test_state_of_zeros_has_rank_zero() -> None:
    found = spectrum(0, torch.zeros(1, 1, 3, 2))
    assert found.values == [0.0, 0.0] and found.stable_rank == 0.0


@pytest.mark.parametrize("family", LINEAR)
def test_rank_is_at_most_the_number_of_tokens(family: str) -> None:
    model = stock_model(family)
    states = recurrent_states(model, random_prompt(model, 2, 3, seed=0))
    assert [layer for layer, _ in states] == [0, 1]
    for found in (spectrum(*state) for state in states):
        assert found.values[0] == pytest.approx(1.0)
        assert found.values[2] > 1e-4
        assert max(found.values[3:]) < 1e-6
        assert 1 <= found.stable_rank <= 3


@pytest.mark.parametrize("family", LINEAR)
def test_states_read_at_once_equal_those_read_token_by_token(family: str) -> None:
    model = stock_model(family)
    tokens = random_prompt(model, 1, 80, seed=0)
    cache: Any = None
    with torch.no_grad():
        for token in tokens.split(1, dim=1):
            output = model(input_ids=token, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
    for layer, state in recurrent_states(model, tokens):
        torch.testing.assert_close(
            state, cache.layers[layer].state["recurrent_state"], rtol=1e-3, atol=1e-4
        )


def test_importing_the_types_imports_no_torch() -> None:
    code = (
        "import sys, launch.ranks.spectra, launch.reporting.page; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
