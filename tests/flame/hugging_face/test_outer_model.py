"""Models of text and more: what is not text passes through bit for bit, under its own names."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flame import convert
from flame.checkpoint.reference import resolve
from flame.errors import UserError
from pruning import prune

TEXT: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
    "linear_value_head_dim": 16, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
EXPERTS = {
    "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 8,
}  # fmt: skip
VISION = {
    "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32,
    "num_position_embeddings": 16,
}  # fmt: skip
FAMILIES = {"qwen3_5": TEXT, "qwen3_5_moe": {**TEXT, **EXPERTS}}


def write_outer(folder: Path, family: str = "qwen3_5", mtp: bool = True) -> dict[str, Tensor]:
    """A model with a vision tower, and an MTP head if asked for, as a published folder has it."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.for_model(family, text_config=FAMILIES[family], vision_config=VISION)
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    if mtp:
        tensors |= {"mtp.fc.weight": torch.randn(8, 4), "mtp.norm.weight": torch.randn(8)}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def run(stage: Any, *words: object) -> None:
    options = stage.STAGE.parse([str(word) for word in words])
    stage.check(options, 1)
    stage.run(options)


PRUNING = ("--method", "l1", "--ratio", 0.5, "--multiple-of", 8)


@pytest.mark.parametrize("family", FAMILIES)
def test_pruning_changes_the_linear_layers_alone(tmp_path: Path, family: str) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    before, out = write_outer(tmp_path / "m", family), tmp_path / "out"
    run(prune, tmp_path / "m", out, *PRUNING)
    after = tensors_of(out)
    assert after.keys() == before.keys()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    prefix = "model.language_model.layers.0.linear_attn."
    assert changed == {prefix + "conv1d.weight", prefix + "in_proj_qkv.weight"}
    config = json.loads((out / "config.json").read_text())
    old = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["text_config"].pop("linear_key_head_dim") == 8
    for key in ("linear_key_head_dim", "rms_norm_eps"):
        config["text_config"].pop(key, None), old["text_config"].pop(key)
    assert config == old
    x = torch.arange(20)[None]
    kinds = (AutoModelForCausalLM, AutoModelForImageTextToText)
    with torch.no_grad():
        text, whole = (kind.from_pretrained(out)(x).logits for kind in kinds)
    assert torch.equal(text, whole)


def test_a_text_model_of_another_width_goes_back_where_it_was(tmp_path: Path) -> None:
    """By way of a run folder, which holds the text model alone."""
    write_outer(tmp_path / "m")
    run(prune, tmp_path / "m", tmp_path / "out", *PRUNING)
    run(prune, tmp_path / "m", tmp_path / "run", *PRUNING, "--to", "dcp")
    assert resolve(tmp_path / "run").config["model_type"] == "qwen3_5_text"
    run(convert, tmp_path / "run", tmp_path / "back", "--to", "hf", "--within", tmp_path / "m")
    out, back = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "back")
    assert out.keys() == back.keys() and all(torch.equal(out[n], back[n]) for n in out)
    assert (tmp_path / "out/config.json").read_text() == (tmp_path / "back/config.json").read_text()


def test_an_mtp_head_of_a_text_model_goes_along(tmp_path: Path) -> None:
    from tests.flame.tiny import build

    build({"model_type": "qwen3_5_text", **TEXT}).save_pretrained(tmp_path / "m")  # type: ignore[operator]
    mtp = {"mtp.fc.weight": torch.randn(8, 4)}
    save_file(tensors_of(tmp_path / "m") | mtp, tmp_path / "m/model.safetensors")
    run(prune, tmp_path / "m", tmp_path / "out", *PRUNING)
    assert torch.equal(tensors_of(tmp_path / "out")["mtp.fc.weight"], mtp["mtp.fc.weight"])


def test_an_mtp_head_without_its_tensors_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_outer(tmp_path / "m", mtp=False)
    file = tmp_path / "m/config.json"
    config = json.loads(file.read_text())
    config["text_config"]["mtp_num_hidden_layers"] = 1
    file.write_text(json.dumps(config))
    run(prune, tmp_path / "m", tmp_path / "out", *PRUNING)
    assert "has an MTP head, but no tensor mtp." in caplog.text


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    whole = write_outer(tmp_path / "m")
    run(convert, tmp_path / "m", tmp_path / "run", "--to", "dcp")
    back = (tmp_path / "run", tmp_path / "out", "--to", "hf", "--within")
    with pytest.raises(UserError, match="this is a text model alone"):
        run(convert, *back, tmp_path / "run")
    with pytest.raises(UserError, match="--within is for --to hf"):
        run(convert, tmp_path / "m", tmp_path / "out", "--to", "dcp", "--within", tmp_path / "m")
    less = {n: t for n, t in whole.items() if "layers.1.mlp.up" not in n}
    save_file(less, tmp_path / "m/model.safetensors")
    with pytest.raises(UserError, match="lacks model.language_model.layers.1.mlp.up_proj.weight"):
        run(convert, *back, tmp_path / "m")
    seen = {name: tensor for name, tensor in whole.items() if "visual" in name}
    save_file(seen, tmp_path / "m/model.safetensors")
    with pytest.raises(UserError, match="has no tensor model.layers.0"):
        run(prune, tmp_path / "m", tmp_path / "out", *PRUNING)
    assert not (tmp_path / "out").exists()
