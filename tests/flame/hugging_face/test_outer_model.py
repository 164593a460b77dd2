"""Models of text and more: what is not text passes through bit for bit, under its own names."""

import itertools
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
from tests.pruning import kda_hybrids
from tests.pruning.models import write_text

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
}  # fmt: skip
GLM = kda_hybrids.CONFIGS["glm5_next_text"] | {"num_nextn_predict_layers": 1, "hidden_size": 32}
FAMILIES = {"qwen3_5": TEXT, "qwen3_5_moe": {**TEXT, **EXPERTS}, "glm5_next": GLM}
SEEING = {
    "glm5_next": {"projection_intermediate_size": 16},
    "qwen3_5": {"num_position_embeddings": 16},
    "qwen3_5_moe": {"num_position_embeddings": 16},
}
HEADS: dict[str, dict[str, tuple[int, ...]]] = {
    "qwen3_5": {"mtp.fc.weight": (8, 4), "mtp.norm.weight": (8,)},
    "qwen3_5_moe": {"mtp.fc.weight": (8, 4), "mtp.norm.weight": (8,)},
    "glm5_next": {
        "model.language_model.layers.3.eh_proj.weight": (8, 4),
        "model.language_model.layers.3.self_attn.q_conv1d.weight": (8, 1, 4),
        "model.language_model.layers.3.mlp.experts.0.up_proj.weight": (8, 4),
        "model.language_model.layers.3.shared_head.norm.weight": (8,),
    },
}
"""Tensors of an MTP head: GLM's is the layer after the last."""


def write_outer(folder: Path, family: str = "qwen3_5", mtp: bool = True) -> dict[str, Tensor]:
    """A model with a vision tower, and an MTP head if asked for, as a published folder has it."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    vision = VISION | SEEING[family]
    config = AutoConfig.for_model(family, text_config=FAMILIES[family], vision_config=vision)
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    if mtp:
        tensors |= {name: torch.randn(shape) for name, shape in HEADS[family].items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def run(stage: Any, *words: object) -> None:
    options = stage.STAGE.parse([str(word) for word in words])
    stage.check(options, 1)
    stage.run(options)


PRUNING = ("--method", "l1", "--ratio", 0.5, "--multiple-of", 8)


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_5_moe"])
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


@pytest.mark.parametrize(("form", "space"), [("nested", "square"), ("flat", "head")])
def test_the_text_model_of_glm_is_pruned_within_the_whole(
    tmp_path: Path, form: str, space: str
) -> None:
    """Tower and MTP head stay, bit for bit; the stock classes compute what our class does."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    before, out = write_outer(tmp_path / "m", "glm5_next"), tmp_path / "out"
    old = json.loads((tmp_path / "m" / "config.json").read_text())
    if form == "flat":
        old = {**old.pop("text_config"), **old}
        (tmp_path / "m" / "config.json").write_text(json.dumps(old))
    text = ("--data", write_text(tmp_path), "--tokenizer", tmp_path / "tokenizer")
    short = ("--sequences", 2, "--seq-len", 32, "--multiple-of", 1)
    reads = text + short if space == "square" else short[-2:]
    run(prune, tmp_path / "m", out, *PRUNING[:4], "--space", space, *reads)
    after, config = tensors_of(out), json.loads((out / "config.json").read_text())
    assert after.keys() == before.keys()
    same = {name for name in after if torch.equal(after[name], before[name])}
    linear = tuple(f"model.language_model.layers.{layer}.self_attn." for layer in (0, 2))
    kept = (".b_proj.weight", "A_log") if space == "square" else ("o_norm.weight", "_a_proj.weight")
    assert same == {n for n in before if not n.startswith(linear) or n.endswith(kept)}
    knobs = {"linear_head_dim", "rms_norm_eps"} if space == "square" else {"linear_num_heads"}
    of_text = (config, old) if form == "flat" else (config["text_config"], old["text_config"])
    assert {key for key in of_text[1] if of_text[0][key] != of_text[1][key]} == knobs
    for each, key in itertools.product(of_text, knobs):
        del each[key]
    assert config == old
    x = torch.arange(20)[None]
    assert "AutoModelForImageTextToText.from_pretrained('out')" in (out / "README.md").read_text()
    whole = AutoModelForImageTextToText.from_pretrained(out)
    run(convert, out, tmp_path / "run", "--to", "dcp")
    run(convert, tmp_path / "run", tmp_path / "text", "--to", "hf")
    assert "import flame.register" in (tmp_path / "text" / "README.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "text")
    decoder, report = type(whole.model.language_model).from_pretrained(
        tmp_path / "text", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["mismatched_keys"]
    with torch.no_grad():
        expected = whole(x).logits
        for found in (model(x).logits, whole.lm_head(decoder(x).last_hidden_state)):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    run(convert, tmp_path / "run", tmp_path / "back", "--to", "hf", "--within", tmp_path / "m")
    back = tensors_of(tmp_path / "back")
    assert after.keys() == back.keys() and all(torch.equal(after[n], back[n]) for n in after)


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


@pytest.mark.parametrize("family", ["qwen3_5", "glm5_next"])
def test_an_mtp_head_without_its_tensors_is_an_error(tmp_path: Path, family: str) -> None:
    """Where the output would promise it again; and where a layer of it lacks."""
    key = "num_nextn_predict_layers" if family == "glm5_next" else "mtp_num_hidden_layers"
    write_outer(tmp_path / "m", family, mtp=family == "qwen3_5")
    file = tmp_path / "m/config.json"
    config = json.loads(file.read_text())
    config["text_config"][key] = 1
    file.write_text(json.dumps(config))
    whole, given = tmp_path / "m", (tmp_path / "out", *PRUNING, "--space", "head")
    layer = "layers.3." if family == "glm5_next" else "mtp.layers.0."
    message = rf"has an MTP head, but no tensor {layer}.*set {key} to 0"
    for stage, *words in ((prune, whole, *given), (convert, whole, *given[:1], "--to", "hf")):
        options = stage.STAGE.parse([str(word) for word in words])
        with pytest.raises(UserError, match=message):
            stage.check(options, 1)
            stage.run(options)
    run(convert, whole, tmp_path / "run", "--to", "dcp")
    with pytest.raises(UserError, match=message):
        run(convert, tmp_path / "run", tmp_path / "out", "--to", "hf", "--within", whole)
    assert not (tmp_path / "out").exists()


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
