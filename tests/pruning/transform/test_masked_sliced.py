"""Masked is sliced, and sliced is reloaded, in the stock class of every family, for every space."""

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from flame.checkpoint.load import load_model
from flame.checkpoint.reference import resolve
from pruning import apply, prune
from pruning.adapters import PRUNED, adapter_for
from pruning.planning.plan import Plan, planned_spaces
from pruning.planning.plan_file import plan_text, read_plan
from pruning.spaces import KINDS, Kind
from pruning.transform.sliced_source import SlicedSource
from pruning.transform.slices import slices_of
from tests.pruning.families import CONFIGS, build, enlarge_stream_, tiny_config, tokens
from tests.pruning.masking import difference, mask
from tests.pruning.models import write_hf
from tests.pruning.uneven import uneven_plan

DENSE = {name: tiny_config(name) for name in CONFIGS} | {
    # With a third key head, as two in two layers cannot be kept in unequal numbers.
    **{
        name: tiny_config(name, num_heads=3, num_v_heads=6)
        for name in CONFIGS
        if "grouped values, hybrid" in name
    },
    # Its model has no bias in its convolutions, whatever its config says.
    "delta_net, gated": tiny_config("delta_net", use_gate=True, num_heads=4, conv_bias=True),
    "gated_deltanet with grouped values": tiny_config(
        "gated_deltanet", num_v_heads=4, head_dim=24, expand_v=0.75
    ),
    "gated_deltanet grouped three to one": tiny_config(
        "gated_deltanet",
        num_heads=3,
        num_v_heads=9,
        head_dim=8,
        allow_neg_eigval=True,
        conv_bias=True,
    ),
}
CASES = {name: config | {"norm_eps": 1e-2} for name, config in DENSE.items()}
"""With an eps that the outputs of random models are not far above: whoever forgets it is seen."""

BUDGET = ["--ratio", "0.4", "--multiple-of", "1"]

EXACT = 1e-8


def bound(model: nn.Module, kind: str) -> float:
    """fla holds the weight of an ungated output norm in float32, whatever the model's dtype."""
    gated = any(".g_proj." in name for name, _ in model.named_parameters())
    return EXACT if gated or "value" not in kind else 2e-7


LENGTHS = [100, 12]
"""In evaluation mode fla takes the chunked operator above 64 tokens, the recurrent one below."""


def kinds_of(case: str) -> list[str]:
    """All kinds of spaces of a case together; each alone in the first case of a family with it."""
    family = CASES[case]["model_type"]
    of_family = [name for name, config in CASES.items() if config["model_type"] == family]
    earlier = of_family[: of_family.index(case)]
    seen = {kind for name in earlier for kind in has_kinds(name)}
    kinds = has_kinds(case)
    return [*(kind for kind in kinds if kind not in seen), ",".join(kinds)]


def has_kinds(case: str) -> list[Kind]:
    has = {space.kind for space in adapter_for(CASES[case]).spaces(CASES[case])}
    return [kind for kind in KINDS if kind in has]


PAIRS = [(case, kind) for case in CASES for kind in kinds_of(case)]
EQUAL = re.compile(",?value-head")
"""Every key head of a model serves as many value heads."""
RAGGED = [
    (case, kind, pad)
    for case, kind in dict.fromkeys((case, EQUAL.sub("", kind)) for case, kind in PAIRS)
    if kind
    for pad in (False, True)
    if pad or f"slim_{CASES[case]['model_type']}" in PRUNED
]


def build_sensitive(config: dict[str, Any]) -> nn.Module:
    """The dense model in float64; of its norms the output norms alone feel their eps."""
    return enlarge_stream_(build(config).double())


def write_dense(folder: Path, config: dict[str, Any], model: nn.Module) -> Path:
    if not folder.exists():
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        write_hf(folder, config, state)
    return folder


def pruned(
    folder: Path,
    config: dict[str, Any],
    flags: Iterable[str],
    form: str = "hf",
    dense: nn.Module | None = None,
) -> tuple[nn.Module, Plan]:
    """The dense model (default: a sensitive one), and the plan that made `folder / form`."""
    dense = build_sensitive(config) if dense is None else dense
    model = write_dense(folder / "dense", config, dense)
    command = [str(model), str(folder / form), "--to", form, *flags]
    options = prune.STAGE.parse([*command, "--method", "l1"])
    prune.check(options)
    prune.run(options)
    return dense, read_plan(folder / form / "plan.json")


def applied(folder: Path, config: dict[str, Any], kind: str, pad: bool) -> tuple[nn.Module, Plan]:
    """The dense model, and a plan of uneven widths that `apply` made `folder / hf` by."""
    dense = build_sensitive(config)
    model = write_dense(folder / "dense", config, dense)
    # Where there is no slim class, no plan without padding describes a model.
    pad_at_once = pad and f"slim_{config['model_type']}" not in PRUNED
    kinds = cast(tuple[Kind, ...], tuple(kind.split(",")))
    plan = uneven_plan(resolve(model), kinds, pad_at_once)
    (folder / "plan.json").write_text(plan_text(plan))
    words = [str(model), str(folder / "plan.json"), str(folder / "hf"), *["--pad"] * pad]
    options = apply.STAGE.parse(words)
    apply.check(options)
    apply.run(options)
    return dense, read_plan(folder / "hf" / "plan.json")


def reloaded(folder: Path) -> nn.Module:
    """The model of a folder as a user loads it, in float64: what differs is then no rounding."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


def logits(model: nn.Module, length: int) -> Tensor:
    with torch.no_grad():
        return model(tokens(2, length)).logits


def masked(dense: nn.Module, plan: Plan, kept_norms: bool = False) -> nn.Module:
    mask(dense, planned_spaces(plan, plan.config_before), plan.kept, kept_norms)
    return dense


@pytest.mark.parametrize(("case", "kind"), PAIRS)
def test_masked_is_sliced_is_reloaded(case: str, kind: str, tmp_path: Path) -> None:
    config = CASES[case]
    dense, plan = pruned(tmp_path, config, [*BUDGET, "--space", kind])
    assert plan.config_after["model_type"] == config["model_type"]
    model = reloaded(tmp_path / "hf")
    before = [logits(dense, length) for length in LENGTHS]
    reference = masked(dense, plan)
    for length, unpruned in zip(LENGTHS, before, strict=True):
        expected = logits(reference, length)
        assert expected.std() > 0.05 and difference(expected, unpruned) > 1e-2
        assert difference(logits(model, length), expected) < bound(model, kind)


@pytest.mark.parametrize("case", ["delta_net", "gated_deltanet with grouped values"])
def test_a_step_of_the_training_format_is_the_same_model(case: str, tmp_path: Path) -> None:
    config = CASES[case]
    write_dense(tmp_path / "dense", config, build(config))
    flags = ["--ratio", "key=0.4,value=0.3,head=0.5", "--space", "key,value,head"]
    for form in ("hf", "dcp"):
        pruned(tmp_path, config, [*flags, "--multiple-of", "1"], form)
    model, stepped = reloaded(tmp_path / "hf"), load_model(resolve(tmp_path / "dcp"))
    for length in LENGTHS:
        assert difference(logits(stepped.double(), length), logits(model, length)) < EXACT


@pytest.mark.parametrize(("case", "kind", "pad"), RAGGED)
def test_uneven_widths_are_masked_too(case: str, kind: str, pad: bool, tmp_path: Path) -> None:
    """In the slim class, and in the stock class with channels and heads of zeros."""
    config = CASES[case]
    if pad and "head" in kind and config.get("qk_norm") == "sum":
        kind = "key,value"
    dense, plan = applied(tmp_path, config, kind, pad)
    family = config["model_type"]
    assert plan.config_after["model_type"] == (family if pad else f"slim_{family}")
    for each in kind.split(","):
        assert len({w for n, row in plan.widths.items() for w in row if n.endswith(f".{each}")}) > 1
    model, reference = reloaded(tmp_path / "hf"), masked(dense, plan)
    for length in LENGTHS:
        assert difference(logits(model, length), logits(reference, length)) < bound(model, kind)


def test_the_knobs_are_the_eps_of_the_config_and_the_weight_of_the_output_norm(
    tmp_path: Path,
) -> None:
    """16 of 32 key channels and 24 of 48 value channels: eps four times, weight sqrt(2) times."""
    config = tiny_config("gated_deltanet", head_dim=32, norm_eps=1e-5)
    flags = ["--ratio", "0.5", "--space", "key,value", "--multiple-of", "8"]
    dense, plan = pruned(tmp_path, config, flags)
    assert plan.undo_gain and not plan.notes
    changed = {key for key in plan.config_after if plan.config_after[key] != config.get(key)}
    assert changed == {"head_dim", "norm_eps"}
    assert plan.config_after["norm_eps"] == 4e-5
    kept = plan.kept["layers.1.value"][0]
    whole, found = (dict(m.named_parameters()) for m in (dense, reloaded(tmp_path / "hf")))
    name = "model.layers.1.attn.o_norm.weight"
    assert torch.equal(found[name], whole[name][kept] * 2**0.5)


def test_the_other_norms_of_the_stock_class_feel_the_eps_too(tmp_path: Path) -> None:
    """The config has one eps for all. The stream that they read is far above it, o need not be."""
    config = tiny_config("gated_deltanet", norm_eps=1e-5)
    dense = build(config).double()
    _, plan = pruned(tmp_path, config, ["--ratio", "0.5", "--multiple-of", "1"], dense=dense)
    pruned(tmp_path / "published", config, ["--ratio", "0.5", "--paper"], dense=dense)
    model, published = reloaded(tmp_path / "hf"), reloaded(tmp_path / "published" / "hf")
    reference = masked(dense, plan)
    expected = logits(reference, 100)
    assert difference(logits(published, 100), expected) > 1e-2
    assert 1e-6 < difference(logits(model, 100), expected) < 1e-3
    for name, module in reference.named_modules():
        if hasattr(module, "eps") and not name.endswith("o_norm"):
            module.eps = plan.config_after["norm_eps"]
    assert difference(logits(model, 100), logits(reference, 100)) < EXACT


PAPER = ["gated_deltanet", "delta_net", "kda"]


@pytest.mark.parametrize("case", PAPER)
def test_as_published_the_tensors_are_bare_slices_under_the_eps_of_before(
    case: str, tmp_path: Path
) -> None:
    kinds = ",".join(kind for kind in ("key", "value") if (case, kind) in PAIRS)
    config = CASES[case]
    dense, plan = pruned(tmp_path, config, ["--ratio", "0.4", "--paper", "--space", kinds])
    assert not plan.undo_gain and "norm_eps" in config
    assert plan.config_after["norm_eps"] == config["norm_eps"]
    assert "key channels multiplies the delta rule's outputs by 1." in plan.notes[0]
    sliced = dict(reloaded(tmp_path / "hf").named_parameters())
    for name, tensor in surviving(plan, dict(dense.state_dict())).items():
        assert torch.equal(sliced[name], tensor), name
    name = "model.layers.0.attn.o_norm.weight"
    assert bool((sliced[name] == 1).all())


def test_as_published_is_masked_but_for_the_eps(tmp_path: Path) -> None:
    """With norms over the kept channels, and an eps so small that the key channels' gain goes."""
    flags = ["--ratio", "0.5", "--paper", "--space", "key,value"]
    found = []
    for name, eps in (("small", 1e-18), ("large", 1e-2)):
        config = tiny_config("gated_deltanet", norm_eps=eps)
        dense, plan = pruned(tmp_path / name, config, flags)
        expected = logits(masked(dense, plan, kept_norms=True), 100)
        found.append(difference(logits(reloaded(tmp_path / name / "hf"), 100), expected))
    assert found[0] < EXACT and found[1] > 1e-3


def train_step(model: nn.Module) -> None:
    """One step of AdamW on tokens seen backwards, in float64; output norms do not decay."""
    norms = [p for name, p in model.named_parameters() if name.endswith("o_norm.weight")]
    others = [p for p in model.parameters() if all(p is not norm for norm in norms)]
    groups = [{"params": norms, "weight_decay": 0.0, "eps": 1e-13}, {"params": others}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, eps=1e-8, weight_decay=0.1)
    inputs = tokens(2, 70)
    scores = model.train()(inputs).logits.flatten(0, 1)
    nn.functional.cross_entropy(scores, inputs.flip(1).flatten()).backward()
    optimizer.step()


@pytest.mark.parametrize(("case", "kind"), PAIRS)
def test_an_optimizer_step_on_both_is_the_same(case: str, kind: str, tmp_path: Path) -> None:
    """What survives moves alike in the masked and in the sliced model.

    AdamW's steps do not grow with a parameter, so those of an output norm's weight, which is c
    times as large, are worth 1 / c.
    """
    config = CASES[case]
    dense, plan = pruned(tmp_path, config, [*BUDGET, "--space", kind])
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    sliced, reference = build(plan.config_after).double(), masked(dense, plan)
    sliced.load_state_dict(surviving(plan, before))
    train_step(reference)
    train_step(sliced)
    start, moved = surviving(plan, before), surviving(plan, reference.state_dict())
    after, cuts = sliced.state_dict(), slices_of(plan, config)
    assert moved.keys() == after.keys()
    for name, tensor in after.items():
        worth = math.prod(part.factor for part in cuts.get(name, ()))
        step = worth * (tensor - start[name])
        assert difference(step, moved[name] - start[name]) < 1e-4, name


def surviving(plan: Plan, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    from tests.memory_source import MemorySource

    source = SlicedSource(MemorySource(tensors), slices_of(plan, plan.config_before))
    return {name: source.read(name) for name in source.names()}


def test_a_padded_model_keeps_its_zeros_in_training(tmp_path: Path) -> None:
    """Their gradients are exactly zero: a padded model can be trained and sliced later."""
    config = CASES["gated_deltanet with grouped values"]
    _, plan = applied(tmp_path, config, "key,value,head", pad=True)
    model = reloaded(tmp_path / "hf")
    zeros = {name: tensor == 0 for name, tensor in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        model.train()(tokens(2, 70)).logits.square().mean().backward()
        optimizer.step()
    blank = 0
    for name, slices in slices_of(plan, config).items():
        tensor = dict(model.named_parameters())[name]
        for part in slices:
            blank += len(part.blank)
            if name.endswith(("A_log", "dt_bias")):
                continue
            filled = tensor.index_select(part.dim, part.blank)
            assert not filled.any(), name
            assert zeros[name].index_select(part.dim, part.blank).all(), name
    assert blank > 0
    assert json.loads((tmp_path / "hf" / "plan.json").read_text())["pad"] is True
