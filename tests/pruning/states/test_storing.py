"""Models whose states are stored between tokens: every family, packed, cached, beside another."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kernels.stored_states import StateStorage
from pruning.adapters import ADAPTERS
from pruning.states.storing import storing_states
from tests.pruning import families, hybrids

FLOAT32, BFLOAT16, INT8 = map(StateStorage, ("float32", "bfloat16", "int8"))
CONFIGS = {**families.CONFIGS, **hybrids.CONFIGS}


def model_of(name: str) -> nn.Module:
    if name in hybrids.CONFIGS:
        return hybrids.build(hybrids.CONFIGS[name])
    return families.build(families.tiny_config(name))


@torch.no_grad()
def logits(
    model: nn.Module, ids: Tensor, storage: StateStorage | None = None, **options: Any
) -> Tensor:
    if storage is None:
        return model(ids, use_cache=False, **options).logits
    with storing_states(model, ADAPTERS[model.config.model_type], storage):
        return model(ids, use_cache=False, **options).logits


@pytest.mark.parametrize("name", CONFIGS)
def test_float32_is_the_model_itself_and_fewer_bits_are_not(name: str) -> None:
    """So calls of few tokens and of many, of all operators, reach ours with all their flags."""
    model = model_of(name)
    for length in (20, 70):
        ids = families.tokens(2, length)
        plain = logits(model, ids)
        torch.testing.assert_close(logits(model, ids, FLOAT32), plain, atol=2e-4, rtol=1e-3)
        lossy = logits(model, ids, INT8)
        # A first token reads no state.
        torch.testing.assert_close(lossy[:, 0], plain[:, 0], atol=2e-4, rtol=1e-3)
        assert float((lossy - plain)[:, 1:].abs().max()) > 1e-3
        torch.testing.assert_close(logits(model, ids), plain)


@pytest.mark.parametrize("name", ["gated_deltanet", "gated_deltaproduct"])
def test_packed_documents_are_separate_ones(name: str) -> None:
    model, ids = model_of(name), families.tokens(1, 75)
    bounds = torch.tensor([0, 3, 75])
    storage = StateStorage("int8", residual="int4")
    packed = logits(model, ids, storage, cu_seqlens=bounds)
    for start, end in ((0, 3), (3, 75)):
        alone = logits(model, ids[:, start:end], storage)
        torch.testing.assert_close(packed[:, start:end], alone, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_a_cached_state_is_the_stored_one() -> None:
    model, ids = model_of("gated_deltanet"), families.tokens(2, 30)
    whole = logits(model, ids, BFLOAT16)
    with storing_states(model, ADAPTERS["gated_deltanet"], BFLOAT16):
        cache = model(ids[:, :20], use_cache=True).past_key_values
        for t in range(20, 30):
            state = cache[0]["recurrent_state"]
            assert torch.equal(state, state.bfloat16().float())
            out = model(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
            torch.testing.assert_close(out.logits[:, 0], whole[:, t], atol=2e-2, rtol=1e-2)


def test_another_model_of_the_family_keeps_its_own_states() -> None:
    model, other = model_of("delta_net"), families.build(families.tiny_config("delta_net"), seed=1)
    ids = families.tokens(2, 40)
    plain = logits(other, ids)
    with storing_states(model, ADAPTERS["delta_net"], INT8):
        torch.testing.assert_close(logits(other, ids), plain)
