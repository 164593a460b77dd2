"""Hybrids of Kimi Delta Attention: heads and squares, as users load them; packed documents."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flame.register  # noqa: F401
from flame.errors import UserError
from flame.model import meta_model
from pruning import prune
from pruning.adapters import ADAPTERS
from pruning.planning.plan import Plan, planned_spaces
from pruning.planning.plan_file import read_plan, with_loaded_tensors
from pruning.spaces import dropped_positions
from pruning.transform.sliced_source import InMemory, SlicedSource
from pruning.transform.slices import slices_of
from tests.memory_source import MemorySource
from tests.pruning.families import tokens
from tests.pruning.hybrids import alone_and_packed, build, reloaded
from tests.pruning.kda_hybrids import CONFIGS, nested, replace_gates_
from tests.pruning.masking import difference, mask
from tests.pruning.models import write_hf, write_text

FLOAT32_NORMS = 5e-5
"""Norms, decays and the operator compute in float32 whatever the model's dtype is."""
KINDS = ("square", "head", "key,value,head")
FORMS = {
    "flat": CONFIGS["kimi_linear"],
    "nested": nested(CONFIGS["kimi_linear"]),
    "glm": CONFIGS["glm5_next_text"],
}
OTHER_EPS = {"kimi_linear": ("o_norm", "kv_a_layernorm"), "glm5_next_text": ("o_norm", "k_norm")}
"""Norms whose eps is not the config's, in the masked model or at all."""


def pruned(folder: Path, config: dict[str, Any], space: str) -> tuple[nn.Module, Plan]:
    """The dense model in float64, and the plan by which `prune` wrote `folder / hf`."""
    dense = build(config)
    state = {name: tensor.clone().contiguous() for name, tensor in dense.state_dict().items()}
    model = write_hf(folder / "dense", config, state)
    words = [str(model), str(folder / "hf"), "--to", "hf", "--method", "l1", "--space", space]
    words += ["--ratio", "0.4", "--multiple-of", "1"]
    if space != "head":
        text = write_text(folder)
        words += ["--data", str(text), "--tokenizer", str(folder / "tokenizer")]
        words += ["--sequences", "4", "--seq-len", "64"]
    options = prune.STAGE.parse(words)
    prune.check(options)
    prune.run(options)
    plan = with_loaded_tensors(read_plan(folder / "hf" / "plan.json"), folder / "hf")
    return dense.double(), plan


def masked(dense: nn.Module, plan: Plan) -> nn.Module:
    """The dense model with zeros for what is gone, and the plan's gates with zeros around them."""
    spaces = planned_spaces(plan, plan.config_before)
    mask(dense, spaces, plan.kept)
    replace_gates_(dense, plan)
    others = OTHER_EPS[plan.config_before["model_type"]]
    for name, module in dense.named_modules():
        for key in ("variance_epsilon", "eps"):
            if hasattr(module, key) and not name.endswith(others):
                setattr(module, key, plan.config_after["rms_norm_eps"])
    return dense


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("space", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_masked_is_sliced_is_reloaded(form: str, space: str, tmp_path: Path) -> None:
    dense, plan = pruned(tmp_path, FORMS[form], space)
    assert plan.undo_gain
    assert bool(plan.new_tensors) == (space != "head")
    before = {length: logits(dense, tokens(2, length)) for length in (100, 12)}
    model, reference = reloaded(tmp_path / "hf"), masked(dense, plan)
    for length, of_dense in before.items():
        expected = logits(reference, tokens(2, length))
        assert difference(expected, of_dense) > 1e-2
        assert difference(logits(model, tokens(2, length)), expected) < FLOAT32_NORMS


@pytest.mark.parametrize("family", CONFIGS)
def test_a_gradient_step_on_both_is_the_same(family: str, tmp_path: Path) -> None:
    """By heads and by a square: with a norm's weight c times as large a step counts 1 / c²."""
    dense, plan = pruned(tmp_path, CONFIGS[family], "key,value,head")
    reference = masked(dense, plan)
    sliced = build(plan.config_after).double()
    cuts = slices_of(plan, plan.config_before)
    whole = {k: v.clone() for k, v in reference.state_dict().items()}
    first = SlicedSource(MemorySource(whole), cuts, InMemory(plan.new_tensors))
    sliced.load_state_dict({name: first.read(name) for name in first.names()})
    for model in (reference, sliced):
        inputs = tokens(2, 70)
        scores = model.train()(inputs, use_cache=False).logits.flatten(0, 1)
        F.cross_entropy(scores, inputs.flip(1).flatten()).backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    moved = reference.state_dict()
    for name, tensor in sliced.named_parameters():
        before, after = whole[name], moved[name]
        worth = math.prod(part.factor for part in cuts.get(name, ()))
        for part in cuts.get(name, ()):
            # The masked model has its inner channels in front, wherever the plan's are.
            inner = name.endswith(("f_a_proj.weight", "g_a_proj.weight")) or (
                part.dim == 1 and name in plan.new_tensors
            )
            at = torch.arange(len(part.kept)) if inner else part.kept
            before, after = (x.index_select(part.dim, at) for x in (before, after))
        step = worth * (tensor - before * worth)
        assert tensor.grad is None or difference(step, after - before) < 1e-3, name


SHARED = CONFIGS["glm5_next_text"] | {
    "layer_types": ["linear_attention", "indexed_attention", "indexed_attention"],
    "indexer_types": ["full", "full", "shared"],
}
"""The last layer attends to the tokens that the one before it chose."""


@pytest.mark.parametrize(
    "config", [*CONFIGS.values(), SHARED], ids=[*CONFIGS, "glm5_next_text shared"]
)
def test_packed_documents_are_separate(config: dict[str, Any]) -> None:
    """Forward and gradients: convolutions, delta rule and latent attention stop at boundaries."""
    alone, packed = alone_and_packed(config)
    ids, bounds = tokens(1, 150), torch.tensor([0, 3, 70, 150])
    found = packed(input_ids=ids, cu_seqlens=bounds, use_cache=False).logits
    parts = [ids[:, a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
    expected = torch.cat([alone(input_ids=part, use_cache=False).logits for part in parts], 1)
    assert difference(found, expected) < 1e-5
    assert difference(logits(alone, ids), expected) > 0.1
    weight = torch.linspace(-1, 1, found.numel()).view_as(found)
    for out in (found, expected):
        (out * weight).sum().backward()
    of_alone = dict(alone.named_parameters())
    for name, parameter in packed.named_parameters():
        assert (parameter.grad is None) == (of_alone[name].grad is None)
        assert parameter.requires_grad == (".indexer." not in name)
        if parameter.grad is not None:
            assert difference(parameter.grad, of_alone[name].grad) < 1e-5, name


@pytest.mark.parametrize("family", CONFIGS)
def test_cached_generation_is_recomputation(family: str, tmp_path: Path) -> None:
    pruned(tmp_path, CONFIGS[family], "square")
    model = reloaded(tmp_path / "hf").float()
    prompt = sequence = tokens(2, 20, seed=3)
    for _ in range(12):
        best = logits(model, sequence)[:, -1].argmax(-1)
        sequence = torch.cat([sequence, best[:, None]], 1)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    options["attention_mask"] = torch.ones_like(prompt)
    assert torch.equal(model.generate(prompt, **options), sequence)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), "--space square"),
        (("--space", "value"), "--space square"),
        (("--space", "key,value", "--ratio", "key=0.5,value=0.25"), "is both"),
        (("--space", "key,value", "--allocate", "model", "--pad"), "--allocate uniform"),
    ],
)
@pytest.mark.parametrize("family", CONFIGS)
def test_one_kind_of_channels_is_refused(
    family: str, words: tuple[str, ...], expected: str, tmp_path: Path
) -> None:
    state = {k: v.clone() for k, v in build(CONFIGS[family]).state_dict().items()}
    model = write_hf(tmp_path / "dense", CONFIGS[family], state)
    ratio = () if "--ratio" in words else ("--ratio", "0.5")
    command = [str(model), str(tmp_path / "out"), "--method", "l1", *ratio, *words]
    with pytest.raises(UserError, match=expected):
        prune.check(prune.STAGE.parse([*command, "--multiple-of", "1"]))


def test_axes_are_those_of_the_class() -> None:
    for config in FORMS.values():
        shapes = {name: tensor.shape for name, tensor in meta_model(config).state_dict().items()}
        spaces = ADAPTERS[config["model_type"]].spaces(config)
        assert {space.layer for space in spaces} == {0, 2}
        for space in spaces:
            for axis in space.axes:
                assert shapes[axis.fqn][axis.dim] == axis.layout.size
                assert len(dropped_positions(axis, (torch.arange(1),) * space.num_heads))
