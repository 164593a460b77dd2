"""Masked is sliced, and sliced is reloaded, in the stock class of every family, for every space."""

import json
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
from pruning.spaces import KINDS, Kind, Space
from pruning.transform.sliced_source import SlicedSource
from pruning.transform.slices import slices_of
from tests.pruning.families import CONFIGS, build, tiny_config, tokens
from tests.pruning.masking import difference, mask, scale_of
from tests.pruning.models import write_hf
from tests.pruning.uneven import uneven_plan

# A hybrid's softmax layers run on a GPU only; without one they would hide nothing else.
NAMES = [name for name in CONFIGS if "hybrid" not in name]
CASES = {name: tiny_config(name) for name in NAMES} | {
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
    "gated_deltaproduct, three steps": tiny_config(
        "gated_deltaproduct hybrid, three steps, no decay, no gate", attn=None
    ),
    "kda with grouped values": tiny_config("kda grouped values, hybrid, bounded decay", attn=None),
}

EXACT = 1e-8

LENGTHS = [100, 12]
"""In evaluation mode fla takes the chunked operator above 64 tokens, the recurrent one below."""


def kinds_of(case: str) -> list[str]:
    """All kinds of spaces of a family together; for its first case each alone too."""
    has = {space.kind for space in adapter_for(CASES[case]).spaces(CASES[case])}
    kinds = [kind for kind in KINDS if kind in has]
    family = CASES[case]["model_type"]
    first = next(name for name, config in CASES.items() if config["model_type"] == family)
    return [*(kinds if case == first else []), ",".join(kinds)]


PAIRS = [(case, kind) for case in CASES for kind in kinds_of(case)]
RAGGED = [
    (case, kind, pad)
    for case, kind in PAIRS
    for pad in (False, True)
    if pad or f"slim_{CASES[case]['model_type']}" in PRUNED
]


def pruned(
    folder: Path, config: dict[str, Any], flags: Iterable[str], form: str = "hf"
) -> tuple[nn.Module, Plan]:
    """The dense model, and the plan by which `prune` wrote `folder / form`."""
    dense = build(config)
    if not (folder / "dense").exists():
        state = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
        write_hf(folder / "dense", config, state)
    command = [str(folder / "dense"), str(folder / form), "--to", form, "--paper", *flags]
    options = prune.STAGE.parse([*command, "--method", "l1"])
    prune.check(options)
    prune.run(options)
    return dense, read_plan(folder / form / "plan.json")


def applied(folder: Path, config: dict[str, Any], kind: str, pad: bool) -> tuple[nn.Module, Plan]:
    """The dense model, and a plan of uneven widths that `apply` made `folder / hf` by."""
    dense = build(config)
    state = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    model = write_hf(folder / "dense", config, state)
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
    """The model of a folder, in float64: what differs is then no rounding."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


def logits(model: nn.Module, length: int) -> Tensor:
    with torch.no_grad():
        return model(tokens(2, length)).logits


def masked(dense: nn.Module, plan: Plan) -> nn.Module:
    dense.double()
    mask(dense, planned_spaces(plan, plan.config_before), plan.kept)
    return dense


def key_width(config: dict[str, Any]) -> int:
    return next(s.head_dim for s in adapter_for(config).spaces(config) if s.kind == "key")


@pytest.mark.parametrize(("case", "kind"), PAIRS)
def test_masked_is_sliced_is_reloaded(case: str, kind: str, tmp_path: Path) -> None:
    config = CASES[case]
    dense, plan = pruned(tmp_path, config, ["--ratio", "0.4", "--space", kind])
    assert plan.config_after["model_type"] == config["model_type"]
    model = reloaded(tmp_path / "hf")
    before = [logits(dense, length) for length in LENGTHS]
    reference = masked(dense, plan)
    for length, unpruned in zip(LENGTHS, before, strict=True):
        expected = logits(reference, length)
        assert expected.std() > 0.05 and difference(expected, unpruned) > 1e-2
        with scale_of(config, key_width(config)):
            assert difference(logits(model, length), expected) < EXACT


@pytest.mark.parametrize("case", ["delta_net", "gated_deltanet with grouped values"])
def test_a_step_of_the_training_format_is_the_same_model(case: str, tmp_path: Path) -> None:
    flags = ["--ratio", "key=0.4,value=0.3,head=0.5", "--space", "key,value,head"]
    for form in ("hf", "dcp"):
        pruned(tmp_path, CASES[case], flags, form)
    model, stepped = reloaded(tmp_path / "hf"), load_model(resolve(tmp_path / "dcp"))
    for length in LENGTHS:
        assert difference(logits(stepped.double(), length), logits(model, length)) < EXACT


@pytest.mark.parametrize(("case", "kind", "pad"), RAGGED)
def test_uneven_widths_are_masked_too(case: str, kind: str, pad: bool, tmp_path: Path) -> None:
    """In the slim class, and in the stock class with channels and heads of zeros."""
    # The norm of a padded layer is exact but for its eps.
    config = CASES[case] | {"norm_eps": 1e-14}
    if pad and "head" in kind and config.get("qk_norm") == "sum":
        kind = "key,value"
    dense, plan = applied(tmp_path, config, kind, pad)
    family = config["model_type"]
    assert plan.config_after["model_type"] == (family if pad else f"slim_{family}")
    for each in kind.split(","):
        assert len({w for n, row in plan.widths.items() for w in row if n.endswith(each)}) > 1
    model, reference = reloaded(tmp_path / "hf"), masked(dense, plan)
    for length in LENGTHS:
        with scale_of(config, key_width(config)):
            # The factor of the norm's weight is stored in float32.
            bound = 1e-4 if pad and "value" in kind else EXACT
            assert difference(logits(model, length), logits(reference, length)) < bound


def test_the_dense_scale_is_what_makes_it_exact(tmp_path: Path) -> None:
    """Without it the outputs differ by the output norm's eps: the tests above would see a slip."""
    config = tiny_config("gated_deltanet", norm_eps=1e-2)
    dense, plan = pruned(tmp_path, config, ["--ratio", "0.5"])
    sliced, reference = reloaded(tmp_path / "hf"), masked(dense, plan)
    expected = logits(reference, 100)
    assert difference(logits(sliced, 100), expected) > 1e-3
    with scale_of(config, 16):
        assert difference(logits(sliced, 100), expected) < EXACT


def train_step(model: nn.Module) -> None:
    """One step of AdamW on tokens seen backwards, in float64."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-8, weight_decay=0.1)
    inputs = tokens(2, 70)
    scores = model.train()(inputs).logits.flatten(0, 1)
    nn.functional.cross_entropy(scores, inputs.flip(1).flatten()).backward()
    optimizer.step()


@pytest.mark.parametrize(("case", "kind"), PAIRS)
def test_an_optimizer_step_on_both_is_the_same(case: str, kind: str, tmp_path: Path) -> None:
    """What survives moves alike in the masked and in the sliced model."""
    config = CASES[case]
    dense, plan = pruned(tmp_path, config, ["--ratio", "0.4", "--space", kind])
    before = {name: tensor.double() for name, tensor in dense.state_dict().items()}
    sliced, reference = build(plan.config_after).double(), masked(dense, plan)
    sliced.load_state_dict(surviving(plan, before))
    train_step(reference)
    with scale_of(config, key_width(config)):
        train_step(sliced)
    start, moved = surviving(plan, before), surviving(plan, whole(reference, before, plan))
    after = sliced.state_dict()
    assert moved.keys() == after.keys()
    for name, tensor in after.items():
        assert difference(tensor - start[name], moved[name] - start[name]) < 1e-4, name


def surviving(plan: Plan, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    from tests.memory_source import MemorySource

    source = SlicedSource(MemorySource(tensors), slices_of(plan, plan.config_before))
    return {name: source.read(name) for name in source.names()}


def whole(model: nn.Module, before: dict[str, Tensor], plan: Plan) -> dict[str, Tensor]:
    """The tensors of a masked model under their own names, norms in full."""
    state = dict(model.state_dict())
    for name in [name for name in state if ".inner." in name]:
        full = name.replace(".inner.", ".")
        kept = plan.kept[norm_space(plan, full).name][0]
        state[full] = before[full].index_copy(0, kept, state.pop(name))
    return state


def norm_space(plan: Plan, fqn: str) -> Space:
    spaces = planned_spaces(plan, plan.config_before)
    return next(s for s in spaces if any(a.fqn == fqn and a.role == "norm" for a in s.axes))


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
