"""Spectra of the states: right on known matrices, and bounded by the tokens that were read."""

import subprocess
import sys
from typing import Any

import pytest
import torch

from flame.errors import UserError
from launch.ranks.spectra import _spectrum, recurrent_states, state_spectra
from launch.speed.decoding import random_prompt
from tests.launch.speed.test_decoding import FAMILIES, stock_model

LINEAR = [family for family in sorted(FAMILIES) if family != "llama"]


def test_spectrum_of_known_states() -> None:
    states = torch.stack(
        [torch.diag(torch.tensor([4.0, 2.0])), torch.diag(torch.tensor([0.0, 8.0]))]
    )
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]])
    spectrum = _spectrum(5, (turn @ states)[None])
    assert spectrum.layer == 5
    assert spectrum.values == pytest.approx([1.0, 0.25], abs=1e-7)
    assert spectrum.stable_rank == pytest.approx((1.25 + 1.0) / 2, abs=1e-7)


def test_state_of_zeros_has_rank_zero() -> None:
    spectrum = _spectrum(0, torch.zeros(1, 1, 3, 2))
    assert spectrum.values == [0.0, 0.0] and spectrum.stable_rank == 0.0


@pytest.mark.parametrize("family", LINEAR)
def test_rank_is_at_most_the_number_of_tokens(family: str) -> None:
    model = stock_model(family)
    spectra = state_spectra(model, random_prompt(model, 2, 3, seed=0))
    assert [spectrum.layer for spectrum in spectra] == [0, 1]
    for spectrum in spectra:
        assert spectrum.values[0] == pytest.approx(1.0)
        assert spectrum.values[2] > 1e-4
        assert max(spectrum.values[3:]) < 1e-6
        assert 1 <= spectrum.stable_rank <= 3


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


def test_softmax_layers_have_no_spectrum() -> None:
    model = stock_model("llama")
    assert state_spectra(model, random_prompt(model, 1, 5, seed=0)) == []


def test_states_that_are_not_finite_name_their_layer() -> None:
    model = stock_model("gated_deltanet")
    with torch.no_grad():
        model.model.layers[1].attn.v_proj.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="layer 1"):
        state_spectra(model, random_prompt(model, 1, 5, seed=0))


def test_importing_the_types_imports_no_torch() -> None:
    code = (
        "import sys, launch.ranks.spectra, launch.reporting.page; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
