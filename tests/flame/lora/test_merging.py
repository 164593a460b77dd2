"""Every kind of adapter on every form of base: what peft makes of it, or a refusal by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flame.checkpoint.fingerprint import fingerprint
from flame.checkpoint.load import load_model
from flame.checkpoint.reference import resolve
from flame.errors import UserError
from tests.flame.lora.adapter_kinds import (
    BIASED,
    TIED,
    UNTIED,
    lora,
    merged_by_peft,
    refused,
    save_adapters,
    variants,
)
from tests.flame.tiny import build, stored_tensors, write_hf_folder, write_run

KINDS = list(variants())


def as_folder(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    return write_hf_folder(folder, config, tensors)


def as_run(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    """A run folder, which holds a tied embedding twice."""
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"]} if config is TIED else {}
    return write_run(folder, config, {**tensors, **head})


def in_bf16(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    return write_hf_folder(folder, config, {n: t.bfloat16() for n, t in tensors.items()})


BASES = {
    "folder": (UNTIED, as_folder),
    "run": (UNTIED, as_run),
    "tied folder": (TIED, as_folder),
    "tied run": (TIED, as_run),
    "biased folder": (BIASED, as_folder),
    "bf16": (UNTIED, in_bf16),
}


def adapters_on(base: Path, folder: Path) -> Path:
    """`folder` with `base` as the base model that its adapters name."""
    path = folder / "adapter_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "base_model_name_or_path": str(base)}))
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_on_every_base_is_what_peft_merges(kind: str, tmp_path: Path) -> None:
    config = variants()[kind]
    expected: dict[str, dict[str, Tensor]] = {}
    plain: dict[str, dict[str, Tensor]] = {}
    for name, (model, write) in BASES.items():
        key = f"{model['model_type']}, tied {model['tie_word_embeddings']}, {len(model)}"
        folder = tmp_path / key
        if key not in expected:
            save_adapters(folder, config, build(model))
            expected[key] = merged_by_peft(folder, model)
            plain[key] = stored_tensors(build(model))
        source = resolve(adapters_on(write(tmp_path / name, model, plain[key]), folder)).source()
        assert set(source.names()) == set(expected[key])
        # In bf16 the base itself is rounded, by half of 2^-8; a residual of it is no worse.
        bound = 2**-7 if name == "bf16" else 1e-6
        changed = 0
        for tensor, wanted in expected[key].items():
            found = source.read(tensor)
            scale = wanted.abs().max()
            assert float((found - wanted).abs().max()) <= bound * scale, (name, tensor)
            torch.testing.assert_close(source.read(tensor, slice(1, 4)), found[1:4])
            changed += not torch.equal(wanted, plain[key][tensor])
        assert changed, name


@pytest.mark.parametrize("kind", list(refused()))
def test_what_peft_does_not_merge_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    config, word = refused()[kind]
    folder = save_adapters(tmp_path / "adapter", config, build(UNTIED))
    base = as_folder(tmp_path / "base", UNTIED, stored_tensors(build(UNTIED)))
    with pytest.raises(UserError, match=word):
        resolve(adapters_on(base, folder)).source()


def test_layers_that_peft_repeats_are_refused(tmp_path: Path) -> None:
    two = {**UNTIED, "num_hidden_layers": 2}
    folder = save_adapters(tmp_path / "a", lora(layer_replication=[[0, 1], [0, 2]]), build(two))
    base = as_folder(tmp_path / "base", two, stored_tensors(build(two)))
    with pytest.raises(UserError, match="layer_replication"):
        resolve(adapters_on(base, folder)).source()


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["lm_head"]},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["lm_head", "embed_tokens"]},
    ],
    ids=str,
)
@pytest.mark.parametrize("write", [as_folder, as_run])
def test_adapters_that_untie_embeddings_are_refused(
    options: dict[str, Any], write: Any, tmp_path: Path
) -> None:
    folder = save_adapters(tmp_path / "adapter", lora(**options), build(TIED))
    base = write(tmp_path / "base", TIED, stored_tensors(build(TIED)))
    with pytest.raises(UserError, match="would untie them"):
        resolve(adapters_on(base, folder)).source()


@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("dora", [False, True])
def test_embeddings_that_are_not_tied_are_merged(module: str, dora: bool, tmp_path: Path) -> None:
    """peft saves such a module's own weight too, which must not hide the adapter."""
    untied = {**TIED, "tie_word_embeddings": False}
    config = lora(target_modules=[module], use_dora=dora)
    folder = save_adapters(tmp_path / "adapter", config, build(untied))
    base = as_folder(tmp_path / "base", untied, stored_tensors(build(untied)))
    source, expected = resolve(adapters_on(base, folder)).source(), merged_by_peft(folder, untied)
    for name, wanted in expected.items():
        torch.testing.assert_close(source.read(name), wanted, rtol=1e-6, atol=1e-6)


def test_a_tied_embedding_trained_in_full_changes_both(tmp_path: Path) -> None:
    """A LoRA run of this project with `train_also = ["embed_tokens"]`, on a base that has both."""
    plain = stored_tensors(build(TIED))
    base = as_run(tmp_path / "base", TIED, plain)
    trained = plain["model.embed_tokens.weight"] + 1
    folder = save_adapters(tmp_path / "adapter", lora(), build(TIED))
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors["base_model.model.model.embed_tokens.weight"] = trained
    save_file(tensors, folder / "adapter_model.safetensors")
    model = load_model(resolve(adapters_on(base, folder)))
    assert torch.equal(model.get_parameter("lm_head.weight"), trained)
    assert torch.equal(model.get_parameter("model.embed_tokens.weight"), trained)


def test_adapters_on_adapters(tmp_path: Path) -> None:
    base = as_folder(tmp_path / "base", UNTIED, stored_tensors(build(UNTIED)))
    first = adapters_on(base, save_adapters(tmp_path / "first", lora(), build(UNTIED)))
    config = lora(init_lora_weights="pissa")
    second = save_adapters(tmp_path / "second", config, load_model(resolve(first)))
    from peft import PeftModel

    expected = PeftModel.from_pretrained(load_model(resolve(first)), str(second))
    merged = dict(expected.merge_and_unload().named_parameters())
    source = resolve(adapters_on(first, second)).source()
    for name in source.names():
        torch.testing.assert_close(source.read(name), merged[name], rtol=1e-5, atol=1e-5)
    assert len(fingerprint(UNTIED, source)) == 64
