"""Tiny real models, data and plans in one folder, and every way in which a person can have them
wrong.

Paths are relative to the folder, which the commands of tests/launch/test_bad_input.py run in.
"""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from flame.checkpoint.fingerprint import fingerprint
from flame.checkpoint.reference import resolve
from flame.checkpoint.save import save_step
from flame.checkpoint.steps import METADATA
from flame.storage.checksums import CHECKSUMS, hash_file
from tests.pruning.models import (
    GATED_DELTANET,
    training_state,
    weights,
    write_hf,
    write_run,
    write_text,
)

RECIPE = """
[data]
dataset = "text.jsonl"
tokenizer = "tokenizer"
virtual_shards = 4

[training]
seq_len = 32
local_batch_size = 1
global_batch_size = 4
steps = 2

[metrics]
enable_tensorboard = false
"""

STEP = Path("model/checkpoint/step-7")
"""The step of the model that the faults damage."""


def build(folder: Path) -> None:
    """Everything that the commands of the tests take, in working order.

    `hf`, `run` and `model` are one model, `other` has the same config and other weights, `deeper`
    another config; `plan.json` and `stats` are of the first. The faults below damage `model`.
    """
    from launch import cli

    write_text(folder)
    tensors = weights(GATED_DELTANET)
    write_run(folder / "run", GATED_DELTANET, tensors, recipe=RECIPE)
    write_hf(folder / "hf", GATED_DELTANET, tensors)
    write_hf(folder / "other", GATED_DELTANET, weights(GATED_DELTANET, seed=1))
    deeper = {**GATED_DELTANET, "num_hidden_layers": 3}
    write_hf(folder / "deeper", deeper, weights(deeper))
    for name in ("run", "hf", "other", "deeper"):
        shutil.copytree(folder / "tokenizer", folder / name, dirs_exist_ok=True)
    shutil.copytree(folder / "run", folder / "model")
    (folder / "config.json").write_text(json.dumps(GATED_DELTANET))
    (folder / "recipe.toml").write_text(
        f'{RECIPE}\n[job]\ndump_folder = "out"\n[model]\nconfig = "config.json"\n'
    )
    before = Path.cwd()
    os.chdir(folder)
    try:
        data = "--data text.jsonl --sequences 4 --seq-len 64"
        cli.dispatch(f"calibrate hf stats --methods drrqr {data}".split())
        cli.dispatch("plan hf plan.json --method random --ratio 0.5".split())
    finally:
        os.chdir(before)


def no_config() -> None:
    Path("model/config.json").unlink()


def config_is_not_json() -> None:
    Path("model/config.json").write_text("{'model_type': gated_deltanet}")


def unknown_family() -> None:
    edit_config(model_type="gated_deltanot")


def tied_widths() -> None:
    edit_config(model_type="rwkv7")


def edit_config(**changes: Any) -> None:
    edit_json(Path("model/config.json"), lambda config: config.update(changes))


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def no_tokenizer() -> None:
    """A folder of Hugging Face without one, which has no recipe to name another."""
    as_hf()
    for path in Path("model").glob("tokenizer*"):
        path.unlink()


def no_metadata() -> None:
    (STEP / METADATA).unlink()


def damaged_metadata() -> None:
    content = bytearray((STEP / METADATA).read_bytes())
    content[len(content) // 2] ^= 1
    (STEP / METADATA).write_bytes(content)


def metadata_of_noise() -> None:
    """Not a pickle, and its recorded hash fits."""
    replace_metadata(b"\x00" * 100)


class _Runs:
    """A pickle of it makes the folder `pwned`."""

    def __reduce__(self) -> Any:
        return os.mkdir, (str(Path("pwned").absolute()),)


def hostile_metadata() -> None:
    """An index whose pickle runs code, and whose recorded hash fits."""
    replace_metadata(pickle.dumps(_Runs()))


def hostile_entry() -> None:
    """A step in order, but for one entry: a pickle that runs code."""
    state = {**load_file("hf/model.safetensors"), "lr_scheduler.last_epoch": _Runs()}
    save_step(state, STEP.parent, 7, {"dataloader.json": b"{}"}, alone=True)


def replace_metadata(content: bytes) -> None:
    (STEP / METADATA).write_bytes(content)
    edit_json(
        STEP / CHECKSUMS, lambda sums: sums["files"].update({METADATA: hash_file(STEP / METADATA)})
    )


def truncated_shard() -> None:
    shard = next(STEP.glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1000])


def nan_weights() -> None:
    """One NaN, in a tensor that no method looks at; the plan is one of these weights."""
    tensors = load_file("hf/model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][5, 3] = float("nan")
    state = {**tensors, **training_state(tensors, 7)}
    save_step(state, STEP.parent, 7, {"dataloader.json": b"{}"}, alone=True)
    plan_fits_model()


def plan_fits_model() -> None:
    reference = resolve("model")
    mark = fingerprint(reference.config, reference.source())
    edit_json(Path("plan.json"), lambda plan: plan.update(fingerprint=mark))


def as_hf() -> None:
    """Let the model be the Hugging Face folder."""
    shutil.rmtree("model")
    shutil.copytree("hf", "model")


def missing_file_in_index() -> None:
    """Two files by an index, one of which is not there."""
    as_hf()
    tensors = load_file("model/model.safetensors")
    Path("model/model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    index = {name: file for file, part in parts.items() for name in part}
    save_file({name: tensors[name] for name in names[::2]}, "model/one.safetensors")
    Path("model/model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def cut_safetensors() -> None:
    as_hf()
    path = Path("model/model.safetensors")
    path.write_bytes(path.read_bytes()[:-1000])


def wrong_shape() -> None:
    """A projection that config.json does not lead to; the plan is one of these weights."""
    as_hf()
    tensors = load_file("model/model.safetensors")
    tensors["model.layers.1.attn.q_proj.weight"] = torch.zeros(3, 3)
    save_file(tensors, "model/model.safetensors", metadata={"format": "pt"})
    plan_fits_model()


def no_text() -> None:
    write_documents([""] * 8)


def little_text() -> None:
    write_documents(["a b"] * 8)


def write_documents(documents: list[str]) -> None:
    lines = [json.dumps({"text": document}) + "\n" for document in documents]
    Path("text.jsonl").write_text("".join(lines))
