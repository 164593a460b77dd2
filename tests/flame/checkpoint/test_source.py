"""Sources: the same tensors, whatever holds them, read whole or by rows."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from flame.checkpoint.dcp_source import DcpSource
from flame.checkpoint.fingerprint import check_finite, fingerprint
from flame.checkpoint.load import load_model, load_weights
from flame.checkpoint.reference import resolve
from flame.checkpoint.save import save_step
from flame.checkpoint.source import TensorInfo, TensorSource
from flame.errors import UserError
from flame.hugging_face.safetensors_source import SafetensorsSource
from flame.lora.source import LoraSource
from tests.distributed import run_distributed
from tests.flame.tiny import (
    GATED_DELTANET,
    LLAMA,
    build,
    stored_tensors,
    write_hf_folder,
    write_run,
)
from tests.memory_source import MemorySource


def _assert_holds(source: TensorSource, expected: dict[str, Tensor]) -> None:
    assert source.names() == sorted(expected)
    for name, tensor in expected.items():
        assert source.info(name) == TensorInfo(tuple(tensor.shape), tensor.dtype)
        assert torch.equal(source.read(name), tensor)


def _train_sharded(folder: Path) -> dict[str, Tensor] | None:
    """Two AdamW steps on a sharded model, saved as torchtitan does; the full tensors on rank 0."""
    import torch.distributed as dist
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        get_optimizer_state_dict,
    )
    from torch.distributed.tensor import DTensor

    from flame.model import shard

    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    model = shard(build(GATED_DELTANET), mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    state = {
        **get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=flat),
        "lr_scheduler": schedule.state_dict(),
        "train_state": {"step": torch.tensor(7), "ntokens_seen": torch.tensor(99)},
    }
    save_step(state, folder, 7)
    named = {**get_model_state_dict(model), **state["optimizer"]}
    full = {
        name: value.full_tensor() if isinstance(value, DTensor) else value
        for name, value in named.items()
        if isinstance(value, Tensor)
    }
    return full if dist.get_rank() == 0 else None


@pytest.fixture(scope="module", params=[2, 4])
def sharded(request: Any, tmp_path_factory: Any) -> tuple[Path, dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp(f"sharded-{request.param}")
    full = run_distributed(_train_sharded, request.param, folder)[0]
    return folder / "step-7", full


def test_one_process_reads_what_many_wrote(sharded: tuple[Path, dict[str, Tensor]]) -> None:
    step, full = sharded
    model = {n: t for n, t in full.items() if not n.startswith(("state.", "param_groups."))}
    _assert_holds(DcpSource(step), model)


def test_the_training_state_can_be_listed(sharded: tuple[Path, dict[str, Tensor]]) -> None:
    step, full = sharded
    source = DcpSource(step, everything=True)
    moment = "state.model.layers.0.attn.q_proj.weight.exp_avg"
    assert torch.equal(source.read(f"optimizer.{moment}"), full[moment])
    assert int(source.read("train_state.step")) == 7
    values = source.values()
    assert values["lr_scheduler.last_epoch"] == 0
    assert values["optimizer.param_groups.model.norm.weight.betas"] == (0.9, 0.999)
    assert DcpSource(step).values() == {}


def test_a_saved_training_state_comes_back_from_its_parts(
    sharded: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    source = DcpSource(sharded[0], everything=True)
    flat: dict[str, Any] = {
        name: torch.empty(info.shape, dtype=info.dtype, device="meta")
        for name in source.names()
        for info in [source.info(name)]
    }
    step = save_step({**flat, **source.values()}, tmp_path, 7, read=source.read, alone=True)
    again = DcpSource(step, everything=True)
    assert again.values() == source.values()
    _assert_holds(again, {name: source.read(name) for name in source.names()})


@pytest.mark.parametrize(
    "rows", [(0, 1), (10, 40), (33, 35), (66, 67), (0, 67), (20, 20), (-5, None)]
)
def test_rows_across_chunks(
    sharded: tuple[Path, dict[str, Tensor]], rows: tuple[int, int | None]
) -> None:
    step, full = sharded
    name = "lm_head.weight"
    assert torch.equal(DcpSource(step).read(name, slice(*rows)), full[name][slice(*rows)])


def test_only_the_files_of_the_rows_are_read(tmp_path: Path) -> None:
    full = run_distributed(_train_sharded, 2, tmp_path)[0]
    os.truncate(tmp_path / "step-7" / "__1_0.distcp", 1000)
    source = DcpSource(tmp_path / "step-7")
    first = slice(0, 34)
    assert torch.equal(source.read("lm_head.weight", first), full["lm_head.weight"][first])
    with pytest.raises(UserError, match=r"__1_0\.distcp is damaged"):
        source.read("lm_head.weight", slice(33, 35))


def test_an_unknown_tensor_is_named(tmp_path: Path) -> None:
    source = DcpSource(save_step({"a": torch.ones(2)}, tmp_path, 1, alone=True))
    with pytest.raises(UserError, match="has no tensor b"):
        source.read("b")


def _sharded_folder(folder: Path, tensors: dict[str, Tensor]) -> Path:
    folder.mkdir()
    names = sorted(tensors)
    files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({n: tensors[n] for n in names if files[n] == file}, folder / file)
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(GATED_DELTANET))
    return folder


TENSORS = {
    "a.weight": torch.arange(20.0).view(5, 4),
    "b.weight": torch.randn(3, 2, 2).to(torch.bfloat16),
    "c": torch.tensor(3, dtype=torch.int64),
    "d": torch.tensor([True, False]),
}


def test_one_file_and_several(tmp_path: Path) -> None:
    one = write_hf_folder(tmp_path / "one", GATED_DELTANET, TENSORS)
    for folder in (one, _sharded_folder(tmp_path / "several", TENSORS)):
        source = SafetensorsSource(folder)
        _assert_holds(source, TENSORS)
        assert torch.equal(source.read("a.weight", slice(1, 3)), TENSORS["a.weight"][1:3])


def test_damaged_safetensors_are_named(tmp_path: Path) -> None:
    several = _sharded_folder(tmp_path / "several", TENSORS)
    second = several / "model-00002-of-00002.safetensors"
    os.truncate(second, second.stat().st_size - 1)
    with pytest.raises(UserError, match=r"model-00002-of-00002\.safetensors is damaged"):
        SafetensorsSource(several).read("b.weight")
    second.unlink()
    with pytest.raises(UserError, match=r"names model-00002-of-00002\.safetensors.*missing"):
        SafetensorsSource(several)
    (several / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json is not a JSON object"):
        SafetensorsSource(several)
    for content in ("{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'):
        (several / "model.safetensors.index.json").write_text(content)
        with pytest.raises(UserError, match="is not a safetensors index"):
            SafetensorsSource(several)


def test_an_index_that_promises_too_much(tmp_path: Path) -> None:
    several = _sharded_folder(tmp_path / "several", TENSORS)
    path = several / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["x"] = index["weight_map"]["c"]
    path.write_text(json.dumps(index))
    with pytest.raises(UserError, match="lacks x"):
        SafetensorsSource(several).read("x")


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="can run code"):
        SafetensorsSource(tmp_path)


def _adapted(**options: Any) -> tuple[nn.Module, dict[str, Tensor], Any]:
    """A model with trained adapters and norms, its LoRA run's tensors, and peft's configuration."""
    from peft import LoraConfig, inject_adapter_in_model

    from flame.lora.names import peft_name

    model = build(GATED_DELTANET)
    config = LoraConfig(r=4, lora_alpha=10, target_modules=["q_proj", "o_proj"], **options)
    inject_adapter_in_model(config, model)
    trained = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "norm" in name or "conv1d" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
                trained[peft_name(name)] = parameter.detach().clone()
    return model, trained, config


def _merged_by_peft(model: nn.Module) -> dict[str, Tensor]:
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.merge()
    return {
        name.replace(".base_layer.", "."): parameter.detach()
        for name, parameter in model.named_parameters()
        if "lora_" not in name
    }


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"o_proj": 2}, "alpha_pattern": {r"layers\.1\.attn\.q_proj": 3}},
    ],
)
def test_adapters_merge_as_in_peft(options: dict[str, Any]) -> None:
    model, trained, config = _adapted(**options)
    base = MemorySource(stored_tensors(build(GATED_DELTANET)))
    source = LoraSource(base, MemorySource(trained), config.to_dict())
    expected = _merged_by_peft(model)
    assert source.names() == sorted(expected)
    changed = 0
    for name, tensor in expected.items():
        assert torch.allclose(source.read(name), tensor, rtol=1e-6, atol=1e-6), name
        assert torch.allclose(source.read(name, slice(1, 3)), tensor[1:3], rtol=1e-6, atol=1e-6)
        changed += not torch.equal(base.read(name), tensor)
    assert changed == 17  # per layer q, o, three convolutions, three norms; and the last norm


def test_adapters_on_a_bf16_base_are_merged_in_fp32() -> None:
    model, trained, config = _adapted()
    rounded = {n: t.bfloat16() for n, t in stored_tensors(build(GATED_DELTANET)).items()}
    source = LoraSource(MemorySource(rounded), MemorySource(trained), config.to_dict())
    name = "model.layers.0.attn.q_proj.weight"
    assert source.info(name).dtype == source.read(name).dtype == torch.float32
    prefix = "base_model.model.model.layers.0.attn.q_proj"
    update = trained[f"{prefix}.lora_B.weight"] @ trained[f"{prefix}.lora_A.weight"] * 2.5
    assert torch.allclose(source.read(name), rounded[name].float() + update, atol=1e-6)


def test_adapters_that_do_not_fit_are_named() -> None:
    _, trained, config = _adapted()
    base = MemorySource(stored_tensors(build(GATED_DELTANET)))
    prefix = "base_model.model.model.layers.0.attn.q_proj"
    lonely = {k: v for k, v in trained.items() if k != f"{prefix}.lora_B.weight"}
    cases = {
        "without its partner": lonely,
        "no parameter": {**trained, "base_model.model.other.weight": torch.ones(1)},
        "makes shape": {**trained, f"{prefix}.lora_B.weight": torch.ones(5, 4)},
    }
    for message, tensors in cases.items():
        with pytest.raises(UserError, match=message):
            LoraSource(base, MemorySource(tensors), config.to_dict())
    with pytest.raises(UserError, match="use_dora"):
        LoraSource(base, MemorySource(trained), {**config.to_dict(), "use_dora": True})


def _lora_run(folder: Path, base: Path) -> tuple[Path, nn.Module]:
    model, trained, config = _adapted()
    run = write_run(folder, GATED_DELTANET, trained)
    (run / "adapter_config.json").write_text(json.dumps(config.to_dict(), default=sorted))
    found = resolve(base)
    record = {"reference": str(base), "fingerprint": fingerprint(found.config, found.source())}
    (run / "base.json").write_text(json.dumps(record))
    return run, model


def test_a_lora_run_is_a_model_reference(tmp_path: Path) -> None:
    base = write_hf_folder(tmp_path / "base", GATED_DELTANET, stored_tensors(build(GATED_DELTANET)))
    run, model = _lora_run(tmp_path / "run", base)
    loaded = load_model(resolve(run))
    expected = _merged_by_peft(model)
    for name, parameter in loaded.named_parameters():
        assert torch.allclose(parameter, expected[name], rtol=1e-6, atol=1e-6)


def test_a_lora_run_wants_the_base_it_was_trained_on(tmp_path: Path) -> None:
    tensors = stored_tensors(build(GATED_DELTANET))
    base = write_hf_folder(tmp_path / "base", GATED_DELTANET, tensors)
    run, _ = _lora_run(tmp_path / "run", base)
    tensors["model.norm.weight"] += 1
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(UserError, match="it has changed since"):
        resolve(run).source()
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"need their base model .*no such folder"):
        resolve(run).source()
    (tmp_path / "elsewhere").rename(run / "beside")
    record = json.loads((run / "base.json").read_text())
    (run / "base.json").write_text(json.dumps({**record, "reference": "beside"}))
    with pytest.raises(UserError, match="it has changed since"):
        resolve(run).source()


@pytest.mark.parametrize("config", [GATED_DELTANET, LLAMA], ids=["untied", "tied"])
def test_a_loaded_model_is_the_saved_one(tmp_path: Path, config: dict[str, Any]) -> None:
    model = build(config)
    folder = write_hf_folder(tmp_path / "hf", config, stored_tensors(model))
    loaded = load_model(resolve(folder))
    for (name, found), (_, expected) in zip(
        loaded.state_dict().items(), model.state_dict().items(), strict=True
    ):
        assert torch.equal(found, expected), name
    for (name, found), (_, expected) in zip(
        loaded.named_buffers(), model.named_buffers(), strict=True
    ):
        assert torch.equal(found, expected), name
    same = loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    assert same == config["tie_word_embeddings"]
    half = load_model(resolve(folder), dtype=torch.bfloat16)
    for name, parameter in half.named_parameters():
        whole = name.endswith(("A_log", "dt_bias"))
        assert parameter.dtype == (torch.float32 if whole else torch.bfloat16), name


def _load_sharded(folder: Path, mesh_shape: tuple[int, ...]) -> dict[str, Tensor]:
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor

    from flame.checkpoint.load import build_sharded

    names = ("replicas", "shards")[-len(mesh_shape) :]
    mesh = dist.init_device_mesh("cpu", mesh_shape, mesh_dim_names=names)
    model = build_sharded(resolve(folder), mesh)
    assert any(isinstance(p, DTensor) for p in model.parameters())
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach()
        for name, p in model.named_parameters()
    }


def test_sharded_models_load_from_sharded_steps(
    sharded: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    step, full = sharded
    run = write_run(tmp_path / "run", GATED_DELTANET, {"x": torch.ones(1)}, step=1)
    (run / "checkpoint" / "step-7").symlink_to(step)
    results = run_distributed(_load_sharded, 2, run, (2,))
    results += run_distributed(_load_sharded, 4, run, (2, 2))
    one = load_model(resolve(run))
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, full[name])
        assert all(torch.equal(result[name], full[name]) for result in results)


def test_a_model_with_adapters_loads_its_base(tmp_path: Path) -> None:
    base = MemorySource(stored_tensors(build(GATED_DELTANET, seed=1)))
    model, _, _ = _adapted()
    adapters = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}
    load_weights(model, base)
    for name, parameter in model.named_parameters():
        plain = name.replace(".base_layer.", ".")
        assert torch.equal(parameter, adapters[name] if name in adapters else base.read(plain))


def test_what_does_not_fit_a_model_is_listed() -> None:
    tensors = stored_tensors(build(GATED_DELTANET))
    model = build(GATED_DELTANET)
    norm = tensors.pop("model.norm.weight")
    source = MemorySource({**tensors, "extra": torch.ones(1)})
    with pytest.raises(UserError, match=r"lacks model\.norm\.weight and has extra, which"):
        load_weights(model, source)
    source = MemorySource({**tensors, "model.norm.weight": norm[:5]})
    with pytest.raises(UserError, match=r"model\.norm\.weight has shape \(5,\).*\(24,\)"):
        load_weights(model, source)


def test_the_fingerprint_ignores_form_and_noise(tmp_path: Path) -> None:
    model = build(LLAMA)
    tensors = stored_tensors(model)
    folder = write_hf_folder(tmp_path / "hf", LLAMA, tensors)
    run = write_run(tmp_path / "run", LLAMA, dict(model.state_dict()))
    assert "lm_head.weight" not in tensors and "lm_head.weight" in model.state_dict()
    digest = fingerprint(LLAMA, resolve(folder).source())
    assert digest == fingerprint(LLAMA, resolve(run).source()) and len(digest) == 64
    noise = {
        "transformers_version": "9",
        "_name_or_path": "x",
        "architectures": ["B", "A"],
        "use_cache": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 31.0,
        "sliding_window": None,
    }
    assert digest == fingerprint({**LLAMA, **noise}, MemorySource(tensors))
    assert digest != fingerprint({**LLAMA, "num_attention_heads": 4}, MemorySource(tensors))


def test_the_fingerprint_sees_every_tensor() -> None:
    tensors = stored_tensors(build(GATED_DELTANET))
    digests = {fingerprint(GATED_DELTANET, MemorySource(tensors))}
    for name in tensors:
        changed = tensors[name].clone()
        changed.view(-1)[-1] += 1
        digests.add(fingerprint(GATED_DELTANET, MemorySource({**tensors, name: changed})))
    assert len(digests) == len(tensors) + 1
    renamed = {f"{name}s" if name == "lm_head.weight" else name: t for name, t in tensors.items()}
    half = {name: t.bfloat16() for name, t in tensors.items()}
    digests |= {fingerprint(GATED_DELTANET, MemorySource(t)) for t in (renamed, half)}
    assert len(digests) == len(tensors) + 3


def test_broken_weights_are_named() -> None:
    tensors = stored_tensors(build(GATED_DELTANET))
    check_finite(MemorySource(tensors))
    name = "model.layers.1.attn.k_proj.weight"
    for value in (float("nan"), float("inf")):
        broken = tensors[name].clone()
        broken[3, 4] = value
        with pytest.raises(UserError, match=f"{name} holds 1 NaN"):
            check_finite(MemorySource({**tensors, name: broken}))
