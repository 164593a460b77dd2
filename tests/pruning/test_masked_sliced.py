"""Masked is sliced, and sliced is reloaded, in the stock classes of both families."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from flame.checkpoint.load import load_model
from flame.checkpoint.reference import resolve
from pruning import prune
from pruning.adapters import adapter_for
from pruning.plan import Plan, planned_spaces, read_plan
from pruning.spaces import dropped_positions
from tests.pruning.families import build, tiny_config, tokens
from tests.pruning.models import write_hf

CASES = {
    "delta_net": tiny_config("delta_net"),
    "delta_net without convolutions": tiny_config("delta_net", use_short_conv=False),
    "gated_deltanet": tiny_config("gated_deltanet"),
    "gated_deltanet with grouped values": tiny_config(
        "gated_deltanet", num_v_heads=4, head_dim=24, expand_v=0.75
    ),
}

LENGTHS = [100, 12]
"""In evaluation mode fla takes the chunked operator above 64 tokens, the recurrent one below."""


def zero_dropped(model: nn.Module, plan: Plan) -> None:
    """Zero the rows of q_proj and k_proj of the channels that the plan drops."""
    parameters = dict(model.named_parameters())
    for space in planned_spaces(plan, plan.config_before):
        for axis in space.axes:
            if axis.role == "projection":
                dropped = dropped_positions(axis, plan.kept[space.name])
                parameters[axis.fqn].data[dropped] = 0


@contextmanager
def scale_of(config: dict[str, Any], head_dim: int) -> Iterator[None]:
    """Let the layers call their operator with the scale of `head_dim` channels."""
    patches = []
    for module_name, attribute in adapter_for(config).op_sites:
        module = importlib.import_module(module_name)
        op = partial(getattr(module, attribute), scale=head_dim**-0.5)
        patches.append(patch.object(module, attribute, op))
    for each in patches:
        each.start()
    try:
        yield
    finally:
        for each in patches:
            each.stop()


def logits(model: nn.Module, length: int) -> Tensor:
    with torch.no_grad():
        return model(tokens(2, length)).logits


def difference(one: Tensor, other: Tensor) -> float:
    """The largest difference in units of the largest entry."""
    return float((one - other).abs().max() / other.abs().max())


@pytest.mark.parametrize("case", CASES)
def test_masked_is_sliced_is_reloaded(case: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    config = CASES[case]
    dense = build(config)
    state = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    write_hf(tmp_path / "dense", config, state)
    for form in ("hf", "dcp"):
        command = ["--method", "l1", "--ratio", "0.4", "--paper", "--to", form]
        options = prune.parse([str(tmp_path / "dense"), str(tmp_path / form), *command])
        prune.check(options)
        prune.run(options)
    plan = read_plan(tmp_path / "hf" / "plan.json")
    head_dim = adapter_for(config).spaces(config)[0].head_dim
    sliced = load_model(resolve(tmp_path / "dcp"))
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    zero_dropped(dense, plan)
    for length in LENGTHS:
        masked = logits(dense, length)
        assert masked.std() > 0.05
        with scale_of(config, head_dim):
            assert difference(logits(sliced, length), masked) < 1e-5
        assert difference(logits(reloaded, length), logits(sliced, length)) < 1e-5


def test_the_dense_scale_is_what_makes_it_exact(tmp_path: Path) -> None:
    """Without it the outputs differ by the output norm's eps: the test above would see a slip."""
    config = tiny_config("gated_deltanet", norm_eps=1e-2)
    dense = build(config)
    state = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    write_hf(tmp_path / "dense", config, state)
    command = [str(tmp_path / "dense"), str(tmp_path / "out"), "--method", "l1", "--ratio", "0.5"]
    prune.run(prune.parse([*command, "--paper"]))
    sliced = load_model(resolve(tmp_path / "out"))
    zero_dropped(dense, read_plan(tmp_path / "out" / "plan.json"))
    masked = logits(dense, 100)
    assert difference(logits(sliced, 100), masked) > 1e-3
    with scale_of(config, 16):
        assert difference(logits(sliced, 100), masked) < 1e-5
