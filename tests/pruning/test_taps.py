"""Taps on real models: what they deliver is what the delta rule computes with."""

import importlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pruning.adapters import ADAPTERS, adapter_for
from pruning.mixers import find_mixers
from pruning.op_call import OpCall
from pruning.taps import tap_mixer_inputs, tap_ops
from tests.pruning.families import CONFIGS, build, tiny_config, tokens

BOUNDARIES = torch.tensor([0, 70, 71, 100])


def record(model: nn.Module, ids: Tensor, **kwargs: Any) -> list[OpCall]:
    calls: list[OpCall] = []
    with tap_ops(model, ADAPTERS[model.config.model_type], calls.append), torch.no_grad():
        model(ids, **kwargs)
    return calls


def mixer_inputs(model: nn.Module, ids: Tensor, **kwargs: Any) -> dict[int, Tensor]:
    seen: dict[int, Tensor] = {}
    adapter = ADAPTERS[model.config.model_type]
    with tap_mixer_inputs(model, adapter, seen.__setitem__), torch.no_grad():
        model(ids, **kwargs)
    return seen


def convolved(x: Tensor, weight: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Depthwise causal convolution of [T, channels], afresh for each document."""
    documents = x.tensor_split(cu_seqlens[1:-1].cpu())
    width = weight.shape[-1]
    return torch.cat(
        [F.conv1d(F.pad(d.T, (width - 1, 0)), weight, groups=len(weight)).T for d in documents]
    )


def weight_of_channels(weight: Tensor, channels: int) -> Tensor:
    """A convolution's weight with a row for each channel, where channels share rows too."""
    if weight.shape[-1] == 1:  # a token shift
        weight = torch.cat([weight, 1 - weight], -1)
    return weight.repeat_interleave(channels // len(weight), 0)


def queries_and_keys(mixer: Any, x: Tensor, cu_seqlens: Tensor) -> list[Tensor]:
    """q and k of [T, hidden], from the mixer's weights and nothing else of fla.

    A delta product's k has a row for each step of a token.
    """
    activations = {"relu": F.relu, "identity": lambda x: x, "silu": F.silu}
    activation = activations[getattr(mixer, "qk_activation", "silu")]
    results = []
    for name in ("q", "k"):
        y = x @ getattr(mixer, f"{name}_proj").weight.T
        if mixer.use_short_conv:
            weight = getattr(mixer, f"{name}_conv1d").weight
            y = convolved(y, weight_of_channels(weight, y.shape[-1]), cu_seqlens)
        channels = y.shape[-1] // mixer.num_heads if name == "q" else results[0].shape[-1]
        results.append(activation(y).reshape(-1, mixer.num_heads, channels))
    return results


def normalised(x: Tensor, power: int) -> Tensor:
    if power == 1:
        return F.normalize(x, p=1, dim=-1, eps=1e-6)
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()


def recurrence(call: OpCall, power: int) -> Tensor:
    """The delta rule, row by row, on what the tap delivered; [B, T, HV, V].

    `power` is 2 for operators that normalise by the L2 norm, 1 for layers that do by the sum.
    """
    groups = call.v.shape[2] // call.q.shape[2]
    q, k = (normalised(x.double(), power).repeat_interleave(groups, 2) for x in (call.q, call.k))
    q = q * q.shape[-1] ** -0.5
    v, beta = call.v.double(), call.beta.double()
    n = call.steps
    starts = set() if call.cu_seqlens is None else set((n * call.cu_seqlens).tolist())
    state = torch.zeros(*v.shape[::2], q.shape[-1], v.shape[-1], dtype=torch.float64)
    outputs = []
    for t in range(k.shape[1]):
        state = torch.zeros_like(state) if t in starts else state
        if call.g is not None:
            decay = call.g[:, t].double().exp()
            state = state * (decay.unsqueeze(-1) if decay.ndim == 3 else decay[..., None, None])
        missing = v[:, t] - (k[:, t, :, None] @ state).squeeze(2)
        state = state + k[:, t, :, :, None] @ (beta[:, t, :, None] * missing)[:, :, None]
        if t % n == n - 1:
            outputs.append((q[:, t // n, :, None] @ state).squeeze(2))
    return torch.stack(outputs, 1)


@pytest.mark.parametrize("length", [7, 100])
@pytest.mark.parametrize("name", CONFIGS)
def test_q_and_k_are_those_after_activation_and_before_any_norm(name: str, length: int) -> None:
    model = build(tiny_config(name))
    ids = tokens(1, length)
    inputs = mixer_inputs(model, ids)
    calls = record(model, ids)
    mixers = find_mixers(model, ADAPTERS[model.config.model_type])
    assert [call.layer for call in calls] == list(mixers) == list(inputs)
    for call in calls:
        expected = queries_and_keys(
            mixers[call.layer], inputs[call.layer], torch.tensor([0, length])
        )
        torch.testing.assert_close([call.q[0], call.k[0]], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_documents_are_convolved_apart(name: str) -> None:
    model = build(tiny_config(name))
    ids = tokens(1, 100)
    inputs = mixer_inputs(model, ids, cu_seqlens=BOUNDARIES)
    mixers = find_mixers(model, ADAPTERS[model.config.model_type])
    for call in record(model, ids, cu_seqlens=BOUNDARIES):
        assert call.cu_seqlens is not None and torch.equal(call.cu_seqlens, BOUNDARIES)
        expected = queries_and_keys(mixers[call.layer], inputs[call.layer], BOUNDARIES)
        torch.testing.assert_close([call.q[0], call.k[0]], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("length", [33, 100])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_delivered_call_reproduces_the_operator_s_output(
    name: str, length: int, packed: bool
) -> None:
    model = build(tiny_config(name))
    rows, kwargs = (1, {"cu_seqlens": torch.tensor([0, 20, length])}) if packed else (2, {})
    outputs: list[Tensor] = []
    for mixer in find_mixers(model, ADAPTERS[model.config.model_type]).values():
        mixer.o_norm.register_forward_pre_hook(lambda module, args: outputs.append(args[0]))
    calls = record(model, tokens(rows, length), **kwargs)
    power = 1 if getattr(model.config, "qk_norm", "l2") == "sum" else 2
    for call, output in zip(calls, outputs, strict=True):
        torch.testing.assert_close(recurrence(call, power).float(), output, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["delta_net", "gated_deltanet", "gated_deltaproduct", "kda"])
def test_training_mode_and_single_tokens_are_seen(name: str) -> None:
    model = build(tiny_config(name))
    adapter = adapter_for(tiny_config(name))
    ids = tokens(1, 100)
    calls: list[OpCall] = []
    with tap_ops(model, adapter, calls.append):
        model.train()(ids, use_cache=False)
        model.eval()
        with torch.no_grad():
            cache = model(ids[:, :99], use_cache=True).past_key_values
            model(ids[:, 99:], past_key_values=cache, use_cache=True)
    assert [call.layer for call in calls] == [0, 1, 2] * 3
    assert [call.q.shape[1] for call in calls] == [100] * 3 + [99] * 3 + [1] * 3
    assert all(call.tokens * call.steps == call.k.shape[1] for call in calls)
    assert not any(call.q.requires_grad or call.beta.requires_grad for call in calls)
    for layer in range(3):
        whole = torch.cat([calls[3 + layer].k, calls[6 + layer].k], dim=1)
        torch.testing.assert_close(whole, calls[layer].k, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["delta_net", "gated_deltanet", "gated_deltaproduct", "kda"])
def test_padding_is_gone(name: str) -> None:
    model = build(tiny_config(name))
    ids = tokens(2, 80)
    mask = torch.ones(2, 80, dtype=torch.int64)
    mask[1, :30] = 0
    calls = record(model, ids, attention_mask=mask)
    inputs = mixer_inputs(model, ids, attention_mask=mask)
    short = record(model, ids[1:, 30:])
    for layer in range(3):
        assert calls[layer].q.shape[:2] == (1, 130)
        assert inputs[layer].shape == (130, model.config.hidden_size)
        after = calls[layer].k[:, 80 * calls[layer].steps :]
        torch.testing.assert_close(after, short[layer].k, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["delta_net", "gated_deltanet", "gated_deltaproduct", "kda"])
def test_tapping_changes_nothing_and_is_undone(name: str) -> None:
    model = build(tiny_config(name))
    adapter = adapter_for(tiny_config(name))
    sites = (*adapter.op_sites, *adapter.norm_sites)
    modules = [importlib.import_module(site.module) for site in sites]

    def bound() -> list[Any]:
        return [getattr(m, site.attribute) for m, site in zip(modules, sites, strict=True)]

    before, ids = bound(), tokens(1, 20)
    with torch.no_grad():
        plain = model(ids).logits
    with pytest.raises(ZeroDivisionError), tap_ops(model, adapter, lambda call: None):
        with torch.no_grad():
            assert torch.equal(model(ids).logits, plain)
        assert all(new is not old for new, old in zip(bound(), before, strict=True))
        raise ZeroDivisionError
    assert all(new is old for new, old in zip(bound(), before, strict=True))
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_an_implementation_put_in_fla_s_place_is_tapped_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = build(tiny_config("gated_deltanet"))
    module = importlib.import_module("fla.layers.gated_deltanet")
    original, ran = module.fused_recurrent_gated_delta_rule, []

    def replacement(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Any:
        ran.append(q.shape)
        return original(q, k, v, **kwargs)

    monkeypatch.setattr(module, "fused_recurrent_gated_delta_rule", replacement)
    calls = record(model, tokens(1, 9))
    assert [call.q.shape for call in calls] == ran and len(ran) == 3
    assert all(call.g is not None and (call.g <= 0).all() for call in calls)


def test_other_models_are_not_reported() -> None:
    student = build(tiny_config("gated_deltanet"))
    teacher = build(tiny_config("gated_deltanet"), seed=1)
    calls: list[OpCall] = []
    with tap_ops(student, ADAPTERS["gated_deltanet"], calls.append), torch.no_grad():
        teacher(tokens(1, 9))
        assert not calls
        student(tokens(1, 9))
    assert len(calls) == 3


def test_a_forward_pass_that_fails_leaves_no_layer_behind() -> None:
    model = build(tiny_config("gated_deltanet"))
    other = build(tiny_config("gated_deltanet"), seed=1)
    handle = model.model.layers[1].attn.a_proj.register_forward_hook(lambda *_: 1 / 0)
    calls: list[OpCall] = []
    with tap_ops(model, ADAPTERS["gated_deltanet"], calls.append), torch.no_grad():
        with pytest.raises(ZeroDivisionError):
            model(tokens(1, 9))
        handle.remove()
        seen = len(calls)
        other(tokens(1, 9))
    assert len(calls) == seen == 1


def test_models_of_another_family_are_refused() -> None:
    model = build(tiny_config("delta_net"))
    with pytest.raises(ValueError, match="no GatedDeltaNet layer"):
        with tap_ops(model, ADAPTERS["gated_deltanet"], lambda call: None):
            pass
