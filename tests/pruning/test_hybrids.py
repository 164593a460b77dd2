"""Transformers' hybrids: taps, layouts, packed documents, and pruned models as users load them."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flame.register  # noqa: F401
from flame.errors import UserError
from pruning import prune
from pruning.adapters import ADAPTERS, adapter_for
from pruning.mixers import find_mixers
from pruning.op_call import OpCall
from pruning.planning.plan import Plan, planned_spaces
from pruning.planning.plan_file import read_plan
from pruning.taps import tap_mixer_inputs, tap_mixer_outputs, tap_ops
from pruning.transform.sliced_source import SlicedSource
from pruning.transform.slices import slices_of
from tests.memory_source import MemorySource
from tests.pruning.families import tokens
from tests.pruning.hybrids import (
    CONFIGS,
    alone_and_packed,
    build,
    reloaded,
    set_eps,
    shrink_output_eps,
)
from tests.pruning.masking import difference, mask
from tests.pruning.models import write_hf

KINDS = ("key", "value", "head", "value-head", "key,value,head,value-head")
LENGTHS = (100, 12)

GROUPED = {kinds: {"linear_num_value_heads": 9} for kinds in KINDS if "value-head" in kinds}
"""Three value heads a key head, of which a ratio of 0.4 keeps one."""

FLOAT32_NORMS = 2e-5
"""Transformers' norms compute in float32 whatever the model's dtype is."""


def pruned(folder: Path, config: dict[str, Any], kinds: str, *flags: str) -> tuple[nn.Module, Plan]:
    """The dense model in float64, and the plan by which `prune` wrote `folder / hf`."""
    dense = build(config).double()
    state = {name: tensor.clone().contiguous() for name, tensor in dense.state_dict().items()}
    model = write_hf(folder / "dense", config, state)
    words = [str(model), str(folder / "hf"), "--to", "hf", "--method", "l1", "--space", kinds]
    options = prune.STAGE.parse([*words, "--ratio", "0.4", "--multiple-of", "1", *flags])
    prune.check(options)
    prune.run(options)
    return dense, read_plan(folder / "hf" / "plan.json")


def masked(dense: nn.Module, plan: Plan) -> nn.Module:
    """The dense model with zeros for what is gone, its eps as the plan leaves them."""
    spaces = planned_spaces(plan, plan.config_before)
    mask(dense, spaces, plan.kept, kept_norms=not plan.undo_gain)
    if plan.undo_gain:
        set_eps(dense, plan.config_after["rms_norm_eps"])
        return dense
    shrink_output_eps(dense, spaces, plan.kept)
    return dense


def logits(model: nn.Module, length: int) -> Tensor:
    with torch.no_grad():
        return model(tokens(2, length), use_cache=False).logits


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("family", CONFIGS)
def test_masked_is_sliced_is_reloaded(family: str, kinds: str, tmp_path: Path) -> None:
    config = CONFIGS[family] | {"rms_norm_eps": 1e-4} | GROUPED.get(kinds, {})
    dense, plan = pruned(tmp_path, config, kinds)
    assert plan.undo_gain == (family != "olmo_hybrid")
    assert plan.config_after["model_type"] == family
    before = {length: logits(dense, length) for length in LENGTHS}
    model, reference = reloaded(tmp_path / "hf"), masked(dense, plan)
    for length in LENGTHS:
        expected = logits(reference, length)
        assert difference(expected, before[length]) > 1e-2
        assert difference(logits(model, length), expected) < FLOAT32_NORMS


def test_what_the_config_cannot_undo_is_said(tmp_path: Path) -> None:
    _, plan = pruned(tmp_path, CONFIGS["olmo_hybrid"], "key")
    width = plan.config_after["linear_key_head_dim"]
    assert f"{math.sqrt(16 / width):.2f}" in plan.notes[0]


def test_padded_widths_of_each_head_are_masked_too(tmp_path: Path) -> None:
    """In the stock class, with channels of zeros where a head keeps fewer than the widest."""
    config = CONFIGS["qwen3_5_text"] | {"rms_norm_eps": 1e-4}
    dense, plan = pruned(tmp_path, config, "key", "--allocate", "model", "--pad")
    assert len({width for row in plan.widths.values() for width in row}) > 1
    model, reference = reloaded(tmp_path / "hf"), masked(dense, plan)
    assert difference(logits(model, 100), logits(reference, 100)) < FLOAT32_NORMS


@pytest.mark.parametrize("family", [name for name in CONFIGS if ADAPTERS[name].can_undo_gain])
def test_a_gradient_step_on_both_is_the_same(family: str, tmp_path: Path) -> None:
    """A norm's weight that is c times as large has gradients of 1 / c: a step counts 1 / c².

    Where the config cannot undo the gain, the norms of the reference have other names.
    """
    config = CONFIGS[family] | {"rms_norm_eps": 1e-4} | GROUPED[KINDS[-1]]
    dense, plan = pruned(tmp_path, config, KINDS[-1])
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    sliced = build(plan.config_after).double()
    sliced.load_state_dict(surviving(plan, before))
    reference = masked(dense, plan)
    for model in (reference, sliced):
        inputs = tokens(2, 70)
        scores = model.train()(inputs, use_cache=False).logits.flatten(0, 1)
        F.cross_entropy(scores, inputs.flip(1).flatten()).backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    start, moved = surviving(plan, before), surviving(plan, reference.state_dict())
    cuts = slices_of(plan, config)
    learning = {
        name: tensor for name, tensor in sliced.named_parameters() if tensor.grad is not None
    }
    for name, tensor in learning.items():
        worth = math.prod(part.factor for part in cuts.get(name, ()))
        step = worth**2 * (tensor - start[name])
        assert difference(step, moved[name] - start[name]) < 1e-4, name


def surviving(plan: Plan, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    source = SlicedSource(MemorySource(tensors), slices_of(plan, plan.config_before))
    return {name: source.read(name) for name in source.names()}


@pytest.mark.parametrize("family", CONFIGS)
def test_taps_deliver_what_the_weights_lead_to(family: str) -> None:
    model, adapter = build(CONFIGS[family]).double(), ADAPTERS[family]
    calls: list[OpCall] = []
    inputs: dict[int, Tensor] = {}
    outputs: dict[int, Tensor] = {}
    with (
        torch.no_grad(),
        tap_ops(model, adapter, calls.append),
        tap_mixer_inputs(model, adapter, inputs.__setitem__),
        tap_mixer_outputs(model, adapter, outputs.__setitem__),
    ):
        model(tokens(1, 40), use_cache=False)
    assert [call.layer for call in calls] == list(inputs) == list(outputs) == [0, 2]
    for call in calls:
        mixer = find_mixers(model, adapter)[call.layer]
        q, k, v = _queries_keys_values(mixer, inputs[call.layer])
        for found, expected in ((call.q, q), (call.k, k), (call.v, v)):
            assert difference(found[0], expected) < 1e-6
        heads = CONFIGS[family]["linear_num_value_heads"]
        assert call.beta.shape == call.g.shape == (1, 40, heads)  # type: ignore[union-attr]
        assert outputs[call.layer].shape == (40, heads * 24)
        assert call.normalizes


def _queries_keys_values(mixer: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of [T, hidden] from the mixer's weights, by head."""
    heads, d_k, d_v = mixer.num_k_heads, mixer.head_k_dim, mixer.head_v_dim
    if hasattr(mixer, "in_proj_qkv"):
        rows = x @ mixer.in_proj_qkv.weight.T
    elif hasattr(mixer, "in_proj_qkvz"):
        by_head = (x @ mixer.in_proj_qkvz.weight.T).unflatten(-1, (heads, -1))
        group = mixer.num_v_heads // heads * d_v
        parts = by_head.split([d_k, d_k, group, group], -1)
        rows = torch.cat([part.flatten(1) for part in parts[:3]], -1)
    else:
        projections = (mixer.q_proj, mixer.k_proj, mixer.v_proj)
        rows = torch.cat([x @ each.weight.T for each in projections], -1)
    kernel = mixer.conv1d.weight
    padded = F.pad(rows.T, (kernel.shape[-1] - 1, 0))
    y = F.silu(F.conv1d(padded, kernel, groups=len(kernel)).T)
    q, k, v = y.split([heads * d_k, heads * d_k, y.shape[-1] - 2 * heads * d_k], -1)
    return q.unflatten(-1, (-1, d_k)), k.unflatten(-1, (-1, d_k)), v.unflatten(-1, (-1, d_v))


@pytest.mark.parametrize("family", CONFIGS)
def test_packed_documents_are_separate(family: str) -> None:
    """Forward and gradients: convolutions, delta rule and softmax attention stop at boundaries."""
    alone, packed = alone_and_packed(CONFIGS[family])
    ids, bounds = tokens(1, 150), torch.tensor([0, 3, 70, 150])
    found = packed(input_ids=ids, cu_seqlens=bounds, use_cache=False).logits
    parts = [ids[:, a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
    expected = torch.cat([alone(input_ids=part, use_cache=False).logits for part in parts], 1)
    assert difference(found, expected) < 1e-5
    assert difference(logits_of(alone, ids), expected) > 0.1
    weight = torch.linspace(-1, 1, found.numel()).view_as(found)
    for out in (found, expected):
        (out * weight).sum().backward()
    of_alone = dict(alone.named_parameters())
    for name, parameter in packed.named_parameters():
        assert parameter.grad is not None or of_alone[name].grad is None
        assert parameter.requires_grad or of_alone[name].grad is None
        if parameter.grad is not None:
            assert difference(parameter.grad, of_alone[name].grad) < 1e-5, name


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("family", CONFIGS)
def test_cached_generation_is_recomputation(family: str, tmp_path: Path) -> None:
    pruned(tmp_path, CONFIGS[family], "key,head")
    model = reloaded(tmp_path / "hf").float()
    prompt = tokens(2, 20, seed=3)
    sequence = prompt
    for _ in range(12):
        best = logits_of(model, sequence)[:, -1].argmax(-1)
        sequence = torch.cat([sequence, best[:, None]], 1)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    options["attention_mask"] = torch.ones_like(prompt)
    assert torch.equal(model.generate(prompt, **options), sequence)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"layer_types": ["full_attention"] * 3}, "no linear_attention"),
        ({"layer_types": ["linear_attention"]}, "expected 3 of"),
        ({"layer_types": ["linear_attention", "mamba", "full_attention"]}, "mamba"),
        ({"linear_num_value_heads": 4}, "not a multiple"),
        ({"linear_key_head_dim": 0}, "linear_key_head_dim"),
        ({"rms_norm_eps": None}, "rms_norm_eps"),
    ],
)
def test_configs_that_cannot_be_pruned(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        adapter_for(CONFIGS["qwen3_5_text"] | changes)


@pytest.mark.parametrize("family", CONFIGS)
def test_layers_without_layer_types_are_those_of_the_class(family: str) -> None:
    from flame.model import stock_config

    for depth in (2, 8, 9):
        config = CONFIGS[family] | {"num_hidden_layers": depth, "layer_types": None}
        config.pop("ple_layer_ids", None)  # which has to name linear layers
        expected = stock_config(config).layer_types
        layers = {space.layer for space in ADAPTERS[family].spaces(config)}
        assert layers == {n for n, name in enumerate(expected) if name == "linear_attention"}


@pytest.mark.parametrize(
    ("family", "way_out"),
    [
        ("bailing_hybrid", "linear_num_heads"),
    ],
)
def test_other_hybrids_are_refused_by_name(family: str, way_out: str) -> None:
    with pytest.raises(UserError, match=rf"{family}.*{way_out}"):
        adapter_for({"model_type": family})
