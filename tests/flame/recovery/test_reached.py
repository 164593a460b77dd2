"""Adapters on modules whose weight a fused kernel reads: trained, or refused by name."""

from pathlib import Path
from typing import Any

import pytest
import torch

import flame.register  # noqa: F401
from flame.checkpoint.load import load_model
from flame.checkpoint.reference import resolve
from flame.errors import UserError
from flame.recipe.sections import Lora
from flame.recovery.lora import initialise_adapters, inject
from flame.recovery.reached import check_reached
from tests.distributed import run_distributed
from tests.flame.jobs import tensors_of, train_job
from tests.flame.tiny import LLAMA, build

TOKENS = torch.arange(40)[None] % 31


def adapted(base: Path) -> dict[str, Any]:
    targets = ["gate_proj", "up_proj", "down_proj", "o_proj"]
    return {
        "model__init": str(base),
        "training__steps": 2,
        "lora__rank": 4,
        "lora__alpha": 8.0,
        "lora__target_modules": targets,
    }


def test_the_fused_mlp_trains_its_adapters(assets: Path, two_ranks: Path, tmp_path: Path) -> None:
    run_distributed(train_job, 2, assets, tmp_path / "run", **adapted(two_ranks))
    tensors = tensors_of(tmp_path / "run/checkpoint/step-2")
    ups = {n: t for n, t in tensors.items() if n.endswith("lora_B.weight") and "optim" not in n}
    assert sum("down_proj" in name for name in ups) == 2
    assert all(bool(tensor.any()) for tensor in ups.values())


def test_an_exported_adapter_on_the_fused_mlp_computes_in_peft_without_fusing(
    assets: Path, two_ranks: Path, tmp_path: Path
) -> None:
    """`fuse_swiglu=False`, as the note of the folder says; with it peft would leave it out."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from flame.checkpoint.convert import convert

    convert(two_ranks, tmp_path / "base", "hf")
    train_job(assets, tmp_path / "run", **adapted(tmp_path / "base"), optimizer__lr=0.1)
    convert(tmp_path / "run", tmp_path / "adapter", "peft")
    assert "fuse_swiglu=False" in (tmp_path / "adapter/README.md").read_text()
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        expected = load_model(resolve(tmp_path / "run"))(tokens).logits
        logits = []
        for fused in (False, True):
            base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", fuse_swiglu=fused)
            logits.append(PeftModel.from_pretrained(base, tmp_path / "adapter")(tokens).logits)
    torch.testing.assert_close(logits[0], expected, rtol=1e-4, atol=1e-4)
    assert float((logits[1] - expected).abs().max()) > 1e-2


def test_a_target_that_no_gradient_reaches_is_named() -> None:
    """Llama's `o_proj`, with its weight read as fla's GSA, HGRN2 and LightNet read theirs."""
    model = build({**LLAMA, "num_hidden_layers": 2})
    inject(model, Lora(rank=2, target_modules=["q_proj", "o_proj"], train_also=["norm"]))
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            module, _, leaf = name.rpartition(".")
            setattr(
                model.get_submodule(module), leaf, torch.nn.Parameter(torch.ones(parameter.shape))
            )
    initialise_adapters(model, seed=0)
    first = model.model.layers[0].self_attn.o_proj
    model(TOKENS).logits.sum().backward()
    check_reached(model, ["q_proj", "o_proj"], ["norm", "bias"])
    model.zero_grad()
    for layer in model.model.layers:
        module = layer.self_attn.o_proj
        module.forward = lambda x, module=module: torch.nn.functional.linear(x, module.weight)
    model(TOKENS).logits.sum().backward()
    with pytest.raises(UserError, match="no gradient reaches 'o_proj'"):
        check_reached(model, ["q_proj", "o_proj"], ["norm"])
    # One layer that calls it is enough: experts of a mixture may have no token.
    del first.forward
    model(TOKENS).logits.sum().backward()
    check_reached(model, ["q_proj", "o_proj"], ["norm"])


@pytest.mark.parametrize("world", [1, 2])
def test_training_stops_before_its_first_update(
    assets: Path, two_ranks: Path, tmp_path: Path, world: int
) -> None:
    run_distributed(refused_job, world, assets, tmp_path / "run", two_ranks)
    assert not list(tmp_path.glob("run/checkpoint/step-*"))


def refused_job(assets: Path, run: Path, base: Path) -> None:
    from unittest.mock import patch

    import flame.recovery.lora

    with patch.object(flame.recovery.lora, "call_targets", lambda model: None):
        with pytest.raises(UserError, match="no gradient reaches 'down_proj'"):
            train_job(assets, run, **adapted(base))


def test_a_tied_output_embedding_is_trained_under_either_name() -> None:
    for name in ("lm_head", "embed_tokens"):
        model = build(LLAMA)
        inject(model, Lora(rank=2, target_modules=["q_proj"], train_also=[name]))
        assert model.get_input_embeddings().weight.requires_grad
        assert not model.model.norm.weight.requires_grad
