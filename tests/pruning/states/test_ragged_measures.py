"""Models whose heads differ in width, measured: as the masked dense model, head for head."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flame.checkpoint.reference import resolve
from flame.errors import UserError
from flame.models.widths import slim_config
from flame.process.distributed import process_group
from launch.evaluation.query_noise import query_noise
from pruning.adapters import ADAPTERS, PRUNED, adapter_for
from pruning.op_call import OpCall
from pruning.states.analysis import Analysis, analyse_states, linear_spaces
from pruning.taps import tap_ops
from tests.flame.models.test_ragged import pair
from tests.pruning.families import tiny_config, tokens
from tests.pruning.models import write_hf

NAMES = [
    "delta_net sum norm, relu, negative eigenvalues",
    "gated_deltanet grouped values, hybrid",
]
ZEROS_CHANGE_NOTHING = ("stable_rank", "threshold_rank", "nuclear_norm", "sigma_1", "decay", "beta")


def analysed(
    model: nn.Module, config: dict[str, Any], folder: Path, texts: list[Tensor]
) -> Analysis:
    state = {name: tensor.clone().contiguous() for name, tensor in model.state_dict().items()}
    write_hf(folder, config, state)
    with process_group():
        return analyse_states(resolve(folder), texts, [40, 70])


@pytest.mark.parametrize("name", [NAMES[0], "gated_deltanet"])
def test_ranks_are_those_of_the_masked_dense_model(name: str, tmp_path: Path) -> None:
    ragged, dense = pair(name, keys_alone=True)
    texts = [tokens(1, 70)]
    found = analysed(ragged, ragged.config.to_dict(), tmp_path / "ragged", texts)
    expected = analysed(dense, tiny_config(name), tmp_path / "dense", texts)
    assert found.layers == expected.layers
    for metric in ZEROS_CHANGE_NOTHING:
        torch.testing.assert_close(
            found.values[metric], expected.values[metric], rtol=1e-4, atol=1e-5
        )
    widths = ragged.config.layer_widths()
    widest = torch.tensor([[min(key, w.value) for key in w.keys] for w in widths.values()])
    used = found.values["stable_rank"] / widest[None, :, :, None]
    torch.testing.assert_close(found.values["utilisation"], used)
    for layer, ours, theirs in zip(widths, found.spectra, expected.spectra, strict=True):
        assert ours.shape[-1] == min(max(widths[layer].keys), widths[layer].value)
        torch.testing.assert_close(ours, theirs[..., : ours.shape[-1]], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_calls_name_their_heads(name: str) -> None:
    ragged, dense = pair(name)
    calls: dict[str, list[OpCall]] = {"ragged": [], "dense": []}
    with torch.no_grad():
        for which, model in (("ragged", ragged), ("dense", dense)):
            adapter = ADAPTERS[model.config.model_type]
            with tap_ops(model, adapter, calls[which].append):
                model(tokens(1, 70))
    whole = {call.layer: call for call in calls["dense"]}
    assert len(calls["ragged"]) > len(whole)
    for call in calls["ragged"]:
        if call.layer != 0:  # which lacks a head of the dense model
            heads = list(call.heads or range(call.beta.shape[-1]))
            expected = whole[call.layer].beta[..., heads]
            torch.testing.assert_close(call.beta, expected, rtol=1e-4, atol=1e-5)


def test_query_noise_is_of_every_head_once() -> None:
    name = "gated_deltanet"
    ragged, dense = pair(name, keys_alone=True)
    asked = torch.tensor([[3, 7], [8, 11]])
    found, expected = (
        query_noise(model, model.config.to_dict(), tokens(2, 20), asked, length=15)
        for model in (ragged, dense)
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.layer, ours.head) == (theirs.layer, theirs.head)
        assert ours.stable_rank == pytest.approx(theirs.stable_rank, rel=1e-4)


def test_what_cannot_be_compared_is_refused() -> None:
    config = slim_config(tiny_config("gated_deltanet"), {"heads": [1, 2, 2]})
    with pytest.raises(UserError, match="layers have 1 to 2 heads"):
        linear_spaces(config)


def test_a_config_without_sense_is_named() -> None:
    config = slim_config(tiny_config("gated_deltanet"), {"heads": [1, 2]})
    with pytest.raises(UserError, match=r"config: widths.heads is \[1, 2\]: .* 3 layers"):
        PRUNED["slim_gated_deltanet"].state_bytes(config)
    with pytest.raises(UserError, match="num_heads is 0"):
        PRUNED["slim_gated_deltanet"].state_bytes({**config, "num_heads": 0})


@pytest.mark.parametrize("family", PRUNED)
def test_a_ragged_model_is_not_pruned_again(family: str) -> None:
    config = slim_config(tiny_config(family.removeprefix("slim_")), {})
    with pytest.raises(UserError, match=f"{family} model is pruned already.*take the dense"):
        adapter_for(config)
