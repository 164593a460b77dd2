"""Folders in every form that people have: read as transformers loads them, or refused in a line."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flame.checkpoint.convert import convert
from flame.checkpoint.load import load_model
from flame.checkpoint.reference import resolve
from flame.errors import UserError
from flame.hugging_face import model_folder
from tests.distributed import run_distributed
from tests.flame.tiny import (
    GATED_DELTANET,
    LLAMA,
    build,
    stored_tensors,
    write_hf_folder,
    write_run,
)

TIED = {**GATED_DELTANET, "tie_word_embeddings": True}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embeddings.weight", "lm_head.weight"
Q_PROJ = "model.layers.0.attn.q_proj.weight"

Change = Callable[[Path], Path | None]


def _edit(change: Callable[[dict[str, Tensor]], Any]) -> Change:
    """A change of the tensors in `model.safetensors`."""

    def edit(folder: Path) -> None:
        tensors = load_file(folder / SINGLE)
        change(tensors)
        save_file(tensors, folder / SINGLE, metadata={"format": "pt"})

    return edit


def _config(**changes: Any) -> Change:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return edit


def _shard(folder: Path, index: Callable[[dict[str, str]], dict[str, str]] = dict) -> None:
    """Split `model.safetensors` into two files; `index` changes what their index says."""
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    places = {name: f"model-{1 + n % 2}.safetensors" for n, name in enumerate(sorted(tensors))}
    for file in sorted(set(places.values())):
        own = {name: tensor for name, tensor in tensors.items() if places[name] == file}
        save_file(own, folder / file, metadata={"format": "pt"})
    content = {"metadata": {"total_size": 1}, "weight_map": index(places)}
    (folder / INDEX).write_text(json.dumps(content))


def _sharded(index: Callable[[dict[str, str]], dict[str, str]] = dict) -> Change:
    return lambda folder: _shard(folder, index)


def _stale_index(folder: Path) -> None:
    tensors = load_file(folder / SINGLE)
    _shard(folder)
    save_file({n: t + 1 for n, t in tensors.items()}, folder / SINGLE, metadata={"format": "pt"})


def _index_missing(folder: Path) -> None:
    _shard(folder)
    (folder / INDEX).unlink()


def _file_missing(folder: Path) -> None:
    _shard(folder)
    (folder / "model-2.safetensors").unlink()


def _index_in_subfolder(folder: Path) -> None:
    _shard(folder, lambda places: {name: f"parts/{file}" for name, file in places.items()})
    (folder / "parts").mkdir()
    for path in folder.glob("model-*.safetensors"):
        shutil.move(path, folder / "parts")
        # A file of the same name outside is not the one that the index names.
        save_file({"other": torch.ones(1)}, path, metadata={"format": "pt"})


def _twice(folder: Path) -> None:
    """A tensor in both files: the later file counts."""
    _shard(folder)
    for number in (1, 2):
        tensors = load_file(folder / f"model-{number}.safetensors")
        tensors[Q_PROJ] = torch.full((12, 24), float(number))
        save_file(tensors, folder / f"model-{number}.safetensors", metadata={"format": "pt"})


def _pickled(folder: Path) -> None:
    torch.save(load_file(folder / SINGLE), folder / "pytorch_model.bin")
    (folder / SINGLE).unlink()


def _pickle_beside(folder: Path) -> None:
    torch.save(
        {n: t + 1 for n, t in load_file(folder / SINGLE).items()}, folder / "pytorch_model.bin"
    )


def _variant(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "model.fp16.safetensors")


def _variant_beside(folder: Path) -> None:
    tensors = {n: t + 1 for n, t in load_file(folder / SINGLE).items()}
    save_file(tensors, folder / "model.fp16.safetensors", metadata={"format": "pt"})


def _in_subfolder(folder: Path) -> Path:
    folder.rename(folder.parent / "outer")
    folder.mkdir()
    return Path(shutil.move(folder.parent / "outer", folder / "inner"))


def _hub_cache(folder: Path) -> Path:
    """The files as the hub's cache has them: links in a snapshot to blobs named by a hash."""
    blobs, snapshot = folder / "blobs", folder / "snapshots" / "0a1b"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, path in enumerate(p for p in list(folder.iterdir()) if p.is_file()):
        path.rename(blobs / f"{number:040x}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"{number:040x}")
    return snapshot


def _named_weights(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "other.safetensors")
    _config(transformers_weights="other.safetensors")(folder)


def _without_prefix(tensors: dict[str, Tensor]) -> None:
    for name in list(tensors):
        tensors[name.removeprefix("model.")] = tensors.pop(name)


def _mixed(tensors: dict[str, Tensor]) -> None:
    dtypes = [torch.bfloat16, torch.float32, torch.float16, torch.float64]
    for number, name in enumerate(sorted(tensors)):
        tensors[name] = tensors[name].to(dtypes[number % 4])


def _lm_head(keep_embedding: bool, add: float = 0.0) -> Change:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[HEAD] = tensors[EMBEDDING] + add
        if not keep_embedding:
            del tensors[EMBEDDING]

    return _edit(change)


def _quantised(dtype: torch.dtype, scale: str) -> Change:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[Q_PROJ] = tensors[Q_PROJ].to(dtype)
        tensors[Q_PROJ.removesuffix("weight") + scale] = torch.ones(12, 1)

    return _edit(change)


def _adds(name: str, value: Tensor) -> Change:
    return _edit(lambda tensors: tensors.update({name: value}))


READ: dict[str, tuple[dict[str, Any], Change]] = {
    "one file": (GATED_DELTANET, lambda folder: None),
    "two files": (GATED_DELTANET, _sharded()),
    "a stale index beside a newer file": (GATED_DELTANET, _stale_index),
    "an index with half of the names": (
        GATED_DELTANET,
        _sharded(lambda places: dict(list(places.items())[: len(places) // 2])),
    ),
    "an index with the wrong file": (
        GATED_DELTANET,
        _sharded(lambda p: dict(zip(p, [*p.values()][::-1], strict=True))),
    ),
    "an index with folders": (GATED_DELTANET, _index_in_subfolder),
    "a tensor in two files": (GATED_DELTANET, _twice),
    "pickles beside": (GATED_DELTANET, _pickle_beside),
    "a variant beside": (GATED_DELTANET, _variant_beside),
    "a subfolder": (GATED_DELTANET, _in_subfolder),
    "links of the hub's cache": (GATED_DELTANET, _hub_cache),
    "a file that config.json names": (GATED_DELTANET, _named_weights),
    "names without a prefix": (TIED, _edit(_without_prefix)),
    "four dtypes": (GATED_DELTANET, _edit(_mixed)),
    "tied, the embedding alone": (TIED, lambda folder: None),
    "tied, the head alone": (TIED, _lm_head(False)),
    "tied, both": (TIED, _lm_head(True)),
    "tied llama, the head alone": (
        LLAMA,
        _edit(lambda tensors: tensors.update({HEAD: tensors.pop("model.embed_tokens.weight")})),
    ),
    "frequencies of rotations": (
        LLAMA,
        _adds("model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(4)),
    ),
}

REFUSED: dict[str, tuple[dict[str, Any], Change, str]] = {
    "no index": (GATED_DELTANET, _index_missing, "only model-1.safetensors, model-2.safetensors"),
    "a missing file": (
        GATED_DELTANET,
        _file_missing,
        "names model-2.safetensors, which is",
    ),
    "an index that promises more": (
        GATED_DELTANET,
        _sharded(lambda places: {**places, "model.other": "model-1.safetensors"}),
        "lacks model.other",
    ),
    "an index that leads away": (
        GATED_DELTANET,
        _sharded(lambda places: {n: f"../hf/{file}" for n, file in places.items()}),
        "no safetensors file in this folder",
    ),
    "pickles": (GATED_DELTANET, _pickled, "can run code"),
    "a variant alone": (GATED_DELTANET, _variant, "only model.fp16.safetensors"),
    "no head": (
        GATED_DELTANET,
        _edit(lambda tensors: tensors.pop(HEAD)),
        "lacks lm_head.weight",
    ),
    "a tensor too many": (GATED_DELTANET, _adds("model.more", torch.ones(1)), "has model.more"),
    "another shape": (GATED_DELTANET, _adds("model.norm.weight", torch.ones(5)), r"shape \(5,\)"),
    "tied, both, that differ": (TIED, _lm_head(True, 1.0), "their values differ"),
    "fp8 with scales": (
        GATED_DELTANET,
        _quantised(torch.float8_e4m3fn, "weight_scale"),
        "dequantise",
    ),
    "int8": (GATED_DELTANET, _quantised(torch.int8, "SCB"), "dequantise"),
    "packed": (
        GATED_DELTANET,
        _edit(lambda t: t.update({Q_PROJ.replace("weight", "qweight"): t.pop(Q_PROJ).int()})),
        "dequantise",
    ),
    "fp8 by config": (
        GATED_DELTANET,
        _config(quantization_config={"quant_method": "fp8"}),
        r"quantised by fp8, .*FineGrainedFP8Config\(dequantize=True\)",
    ),
    "compressed-tensors": (
        GATED_DELTANET,
        _config(quantization_config={"quant_method": "compressed-tensors"}),
        r"CompressedTensorsConfig\(run_compressed=False\)",
    ),
    "bitsandbytes of old": (
        GATED_DELTANET,
        _config(quantization_config={"load_in_4bit": True}),
        "quantised by bitsandbytes",
    ),
    "modelopt": (
        GATED_DELTANET,
        lambda folder: (folder / "hf_quant_config.json").write_text("{}") and None,
        "hf_quant_config.json",
    ),
}


def _folder(tmp_path: Path, config: dict[str, Any], change: Change) -> Path:
    folder = write_hf_folder(tmp_path / "hf", config, stored_tensors(build(config)))
    return change(folder) or folder


def _of_transformers(folder: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The parameters that transformers loads in fp32, and what it finds missing."""
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    return dict(model.state_dict()), [*report["missing_keys"], *report["mismatched_keys"]]


def _assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("form", READ)
def test_what_is_read_is_what_transformers_loads(tmp_path: Path, form: str) -> None:
    folder = _folder(tmp_path, *READ[form])
    expected, missing = _of_transformers(folder)
    assert not missing
    _assert_same(dict(load_model(resolve(folder)).state_dict()), expected)
    convert(folder, tmp_path / "run", "dcp")
    convert(tmp_path / "run", tmp_path / "back", "hf")
    for copy in ("run", "back"):
        _assert_same(dict(load_model(resolve(tmp_path / copy)).state_dict()), expected)
    exported, missing = _of_transformers(tmp_path / "back")
    assert not missing
    _assert_same(exported, expected)


@pytest.mark.parametrize("form", REFUSED)
def test_what_is_not_read_is_refused_in_one_line(tmp_path: Path, form: str) -> None:
    config, change, message = REFUSED[form]
    folder = _folder(tmp_path, config, change)
    for to in ("hf", "dcp"):
        with pytest.raises(UserError, match=message) as caught:
            convert(folder, tmp_path / "out", to)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=message):
        load_model(resolve(folder))
    assert not (tmp_path / "out").exists()


HYBRID = {
    "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64, "intermediate_size": 24,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 16,
    "linear_value_head_dim": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
RENAMED: dict[str, dict[str, Any]] = {
    "qwen3_next": {**HYBRID, **EXPERTS, "shared_expert_intermediate_size": 8},
    "olmo_hybrid": {**HYBRID, "num_key_value_heads": 2, "linear_value_head_dim": 24},
    "kimi_linear": {
        **HYBRID, "num_key_value_heads": 2, "moe_intermediate_size": 8, "num_local_experts": 3,
        "num_experts_per_tok": 2, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
        "v_head_dim": 16, "linear_head_dim": 16, "linear_num_heads": 2,
        "mlp_layer_types": ["dense", "sparse"],
    },
    "glm5_next_text": {
        **HYBRID, "num_key_value_heads": 2, "moe_intermediate_size": 8, "n_routed_experts": 3,
        "num_experts_per_tok": 2, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8,
        "v_head_dim": 16, "linear_head_dim": 16, "linear_num_heads": 2, "hc_mult": 2,
        "index_n_heads": 2, "index_head_dim": 8, "mlp_layer_types": ["dense", "sparse"],
    },
    "mixtral": {**HYBRID, "num_local_experts": 3},
    "qwen3_moe": {**HYBRID, **EXPERTS},
}  # fmt: skip
"""Families whose modules have other names than their tensors on a disk."""


@pytest.mark.parametrize("family", RENAMED)
def test_names_of_the_disk_are_read_and_written_as_stock_does(tmp_path: Path, family: str) -> None:
    from transformers import AutoModelForCausalLM

    from flame.checkpoint.fingerprint import fingerprint

    model = build({"model_type": family, **RENAMED[family]})
    model.save_pretrained(tmp_path / "stock")  # type: ignore[operator]
    expected = dict(model.state_dict())
    reference = resolve(tmp_path / "stock")
    source = reference.source()
    _assert_same({name: source.read(name) for name in source.names()}, expected)
    name = min(expected.keys() - load_file(tmp_path / "stock" / SINGLE).keys())
    assert torch.equal(source.read(name, slice(1, 3)), expected[name][1:3])
    _assert_same(dict(load_model(reference).state_dict()), expected)
    convert(tmp_path / "stock", tmp_path / "run", "dcp")
    convert(tmp_path / "run", tmp_path / "back", "hf")
    _assert_same(load_file(tmp_path / "back" / SINGLE), load_file(tmp_path / "stock" / SINGLE))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32)
    _assert_same(dict(loaded.state_dict()), expected)
    run = resolve(tmp_path / "run")
    assert fingerprint(run.config, run.source()) == fingerprint(reference.config, source)


def test_the_text_model_of_a_model_that_sees_is_what_transformers_loads(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import AutoModelForImageTextToText, Qwen3_5Config

    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}
    config = Qwen3_5Config(text_config=HYBRID, vision_config={**vision, "out_hidden_size": 32})
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path / "hf")
    expected, missing = _of_transformers(tmp_path / "hf")
    assert not missing
    _assert_same(dict(load_model(resolve(tmp_path / "hf")).state_dict()), expected)
    assert "visual" in caplog.text and "left out" in caplog.text
    convert(tmp_path / "hf", tmp_path / "run", "dcp")
    convert(tmp_path / "run", tmp_path / "back", "hf")
    _assert_same(_of_transformers(tmp_path / "back")[0], expected)


def test_a_step_with_one_of_two_tied_tensors_is_whole(tmp_path: Path) -> None:
    state = dict(build(TIED).state_dict())
    for kept, lost in ((EMBEDDING, HEAD), (HEAD, EMBEDDING)):
        only = {name: tensor for name, tensor in state.items() if name != lost}
        run = write_run(tmp_path / kept, TIED, only)
        _assert_same(dict(load_model(resolve(run)).state_dict()), state)
        convert(run, tmp_path / f"{kept}-hf", "hf")
        exported, missing = _of_transformers(tmp_path / f"{kept}-hf")
        assert not missing
        _assert_same(exported, state)
    run = write_run(tmp_path / "differ", TIED, {**state, HEAD: state[HEAD] + 1})
    for read in (lambda: load_model(resolve(run)), lambda: convert(run, tmp_path / "out", "hf")):
        with pytest.raises(UserError, match="their values differ"):
            read()


def _sharded_tensors(folder: Path) -> dict[str, Tensor]:
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor

    from flame.checkpoint.load import build_sharded

    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    state = build_sharded(resolve(folder), mesh).state_dict()
    return {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in state.items()}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_next", "olmo_hybrid"])
def test_ranks_read_their_rows_of_stacked_experts(tmp_path: Path, family: str) -> None:
    model = build({"model_type": family, **RENAMED[family]})
    model.save_pretrained(tmp_path / "m")  # type: ignore[operator]
    for found in run_distributed(_sharded_tensors, 2, tmp_path / "m"):
        _assert_same(found, dict(model.state_dict()))


JUNK: list[Any] = [
    None,
    0,
    -1,
    2**70,
    1.5,
    "",
    "x",
    "../model.safetensors",
    [],
    {},
    [[]],
    "\0",
    "é" * 99,
]


def _mutated(content: dict[str, Any], generator: random.Random) -> dict[str, Any]:
    """A JSON object with one key or value, at any depth, replaced, added or removed."""
    content = json.loads(json.dumps(content))
    inner = content
    while True:
        parts = [value for value in inner.values() if isinstance(value, dict) and value]
        if not parts or generator.random() < 0.3:
            break
        inner = generator.choice(parts)
    key, junk = generator.choice(list(inner)), generator.choice(JUNK)
    kind = generator.randrange(3)
    if kind == 0:
        inner[key] = junk
    elif kind == 1:
        inner[generator.choice(["", "model.x", "__metadata__", str(junk)])] = inner.pop(key)
    else:
        del inner[key]
    return content


def _damage(folder: Path, generator: random.Random) -> None:
    """Change the index, a header, the config or bytes of one file of a folder."""
    kind = generator.choice(["index", "header", "header", "config", "bytes", "cut"])
    path = folder / "model-1.safetensors"
    data = path.read_bytes()
    if kind in ("index", "config"):
        file = folder / (INDEX if kind == "index" else "config.json")
        file.write_text(json.dumps(_mutated(json.loads(file.read_text()), generator)))
    elif kind == "header":
        length = int.from_bytes(data[:8], "little")
        header = json.dumps(_mutated(json.loads(data[8 : 8 + length]), generator)).encode()
        size = len(header) if generator.random() < 0.8 else generator.choice([0, 7, 2**40, 2**63])
        path.write_bytes(size.to_bytes(8, "little") + header + data[8 + length :])
    elif kind == "cut":
        path.write_bytes(data[: generator.randrange(len(data))])
    else:
        position = generator.randrange(min(len(data), 4000))
        path.write_bytes(data[:position] + generator.randbytes(3) + data[position + 3 :])


@pytest.mark.slow
def test_damaged_folders_are_refused_or_whole(tmp_path: Path) -> None:
    whole = _folder(tmp_path, GATED_DELTANET, _sharded())
    generator, refused = random.Random(7), 0
    names = sorted(resolve(whole).source().names())
    for number in range(600):
        folder = tmp_path / "damaged"
        shutil.copytree(whole, folder)
        _damage(folder, generator)
        try:
            convert(folder, tmp_path / "out", "hf")
            assert sorted(resolve(tmp_path / "out").source().names()) == names
        except UserError as error:
            assert "\n" not in str(error), number
            refused += 1
            assert not (tmp_path / "out").exists()
        assert {path.name for path in tmp_path.iterdir()} <= {"hf", "damaged", "out"}
        shutil.rmtree(folder)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert refused > 300


def test_experts_that_do_not_fit_together_are_named(tmp_path: Path) -> None:
    family = "qwen3_moe"
    build({"model_type": family, **RENAMED[family]}).save_pretrained(tmp_path / "m")  # type: ignore[operator]
    expert = "model.layers.0.mlp.experts.1.down_proj.weight"
    _edit(lambda tensors: tensors.update({expert: torch.ones(3, 3)}))(tmp_path / "m")
    with pytest.raises(UserError, match="do not fit together as model.layers.0.mlp.experts.down"):
        resolve(tmp_path / "m").source()
    _edit(lambda tensors: tensors.pop(expert))(tmp_path / "m")
    with pytest.raises(UserError, match=r"experts.down_proj has shape \(2,"):
        convert(tmp_path / "m", tmp_path / "out", "hf")


def test_an_export_that_comes_back_changed_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _folder(tmp_path, GATED_DELTANET, lambda folder: None)
    write = model_folder.write_safetensors

    def faulty(path: Path, *arguments: Any) -> None:
        write(path, *arguments)
        data = bytearray(path.read_bytes())
        data[-1] ^= 4
        path.write_bytes(bytes(data))

    monkeypatch.setattr(model_folder, "write_safetensors", faulty)
    with pytest.raises(UserError, match="came back from the disk changed"):
        convert(folder, tmp_path / "out", "hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]
