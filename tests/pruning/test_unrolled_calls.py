"""Delta products and decays per channel at the tap: what statistics and states are made from."""

from typing import Any

import pytest
import torch
from torch import Tensor

from flame.errors import UserError
from pruning.adapters import ADAPTERS
from pruning.op_call import OpCall
from pruning.planning.plan import spaces_of_kinds
from pruning.spaces import Space
from pruning.states.rollout import sampled_states, states_after
from pruning.statistics import KeySquares, QueryKeyGram, ValueSquares
from pruning.taps import operator_for, tap_ops
from tests.pruning.families import CONFIGS, build, tiny_config, tokens

NAMES = [name for name in CONFIGS if name.startswith(("gated_deltaproduct", "kda"))]
BOUNDS = torch.tensor([0, 40, 41, 100])


def calls_of(name: str, ids: Tensor, **options: Any) -> tuple[list[OpCall], list[Tensor]]:
    """The calls of a forward pass, and the states that the layers keep, key dimension first."""
    model = build(tiny_config(name))
    calls: list[OpCall] = []
    with tap_ops(model, ADAPTERS[model.config.model_type], calls.append), torch.no_grad():
        cache = model(ids, use_cache=True, **options).past_key_values
    kept = [cache[call.layer]["recurrent_state"] for call in calls]
    # KDA's layer asks its operator for the value dimension first.
    return calls, [state.mT if name.startswith("kda") else state for state in kept]


@pytest.mark.parametrize("length", [20, 100])
@pytest.mark.parametrize("name", NAMES)
def test_states_are_those_that_the_layer_keeps(name: str, length: int) -> None:
    calls, kept = calls_of(name, tokens(2, length))
    operator = operator_for(ADAPTERS[tiny_config(name)["model_type"]])
    for call, state in zip(calls, kept, strict=True):
        *_, last = states_after(call, operator, [1, length // 2, length])
        torch.testing.assert_close(last.float(), state, atol=1e-5, rtol=1e-4)
        *_, sampled = sampled_states(call, operator)
        torch.testing.assert_close(sampled, last, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_states_of_packed_documents(name: str) -> None:
    """The last ones that are sampled are those of the two long documents."""
    calls, kept = calls_of(name, tokens(1, 100), cu_seqlens=BOUNDS)
    operator = operator_for(ADAPTERS[tiny_config(name)["model_type"]])
    for call, state in zip(calls, kept, strict=True):
        found = list(sampled_states(call, operator, every=30))
        assert [len(states) for states in found] == [3, 2]
        torch.testing.assert_close(found[1].float(), state[[0, 2]], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_queries_count_once_and_each_householder_key_once(name: str) -> None:
    config = tiny_config(name)
    calls, _ = calls_of(name, tokens(1, 100))
    steps, space = config.get("num_householder", 1), of_kind(config, "key")
    for call in calls:
        gram, squares = QueryKeyGram.zeros(space), KeySquares.zeros(space)
        gram.update(call)
        squares.update(call)
        rows = torch.cat([call.q[0], call.k[0]]).double()
        assert (call.steps, call.tokens, len(rows)) == (steps, 100, (1 + steps) * 100)
        torch.testing.assert_close(gram.gram, torch.einsum("thc,thd->hcd", rows, rows))
        torch.testing.assert_close(squares.squares, rows.square().sum(0))
        assert (int(gram.tokens), int(squares.terms)) == (100, len(rows))


def of_kind(config: dict[str, Any], kind: str) -> Space:
    spaces = ADAPTERS[config["model_type"]].spaces(config)
    return next(space for space in spaces if space.kind == kind)


def test_values_of_all_steps_are_summed() -> None:
    (call, *_), _ = calls_of("gated_deltaproduct", tokens(1, 30))
    found = ValueSquares.zeros(of_kind(tiny_config("gated_deltaproduct"), "value"))
    found.update(call)
    torch.testing.assert_close(found.squares[0], call.v.double().square().sum((0, 1, 2)))
    assert found.terms == 30 * 2 * 2


@pytest.mark.parametrize("length", [20, 100])
@pytest.mark.parametrize("name", NAMES)
def test_decay_and_strength_are_those_of_tokens(name: str, length: int) -> None:
    """Whichever operator the layer took."""
    config, (calls, _) = tiny_config(name), calls_of(name, tokens(1, length))
    decays = config["model_type"] == "kda" or config["use_forget_gate"]
    for call in calls:
        assert call.decay.shape == call.strength.shape == (1, length, call.v.shape[2])
        assert bool((call.decay < 1 if decays else call.decay == 1).all())
        limit = 2 if config.get("allow_neg_eigval") else 1
        assert bool(((call.strength > 0) & (call.strength < limit)).all())


def test_value_channels_of_kda_are_refused_with_the_reason() -> None:
    config = tiny_config("kda")
    with pytest.raises(UserError, match="rank of its decay's.*choose from head, key"):
        spaces_of_kinds(ADAPTERS["kda"], config, ["value"])
