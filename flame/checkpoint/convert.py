"""Converting models between DCP and Hugging Face, bit for bit, with one tensor in memory.

Config, generation config and tokenizer are copied too. A LoRA run is merged with its base.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from flame.checkpoint.peft_folder import check_adapters, write_adapters
from flame.checkpoint.reference import (
    CHECKPOINT_FOLDER,
    CONFIG_FILE,
    RECIPE_FILE,
    TOKENIZER_FILES,
    ModelReference,
    check_destination,
    resolve,
)
from flame.checkpoint.safetensors_source import SAFETENSORS_INDEX
from flame.checkpoint.save import save_step
from flame.checkpoint.source import Read, TensorInfo, total_bytes
from flame.checkpoint.ties import OUTPUT_EMBEDDING, input_embedding, is_tied, own_names
from flame.errors import UserError
from flame.models import write_loading_note
from flame.process.atomic_output import replacing_folder
from flame.process.progress import progress
from flame.storage.json_file import write_object
from flame.storage.safetensors_file import write_safetensors

Format = Literal["hf", "dcp", "peft"]
COMPANION_FILES = (*TOKENIZER_FILES, "generation_config.json")
MAX_SHARD_SIZE = "5GB"


def convert(
    src: str | Path, dst: Path, to: Format, overwrite: bool = False, inside_source: bool = False
) -> None:
    """Write the model that `src` names as a Hugging Face folder, a run folder or a peft folder.

    Args:
        src: any model reference.
        dst: the folder to write; a run folder gets the model as `checkpoint/step-0`.
        to: `"hf"`, `"dcp"`, or `"peft"` for the adapters of a LoRA run alone.
        overwrite: replace an existing `dst`.
        inside_source: allow `dst` in the source's folder, as a run's own `merged/` is.

    Raises:
        UserError: the source is damaged, the output is refused, or the disk is too small.
    """
    dst = Path(dst).absolute()
    reference = resolve(src)
    check_destination(reference, dst, overwrite, inside_source)
    if to == "peft":
        check_adapters(reference)
        check_space(dst, total_bytes(reference.own_source()))
        with replacing_folder(dst, overwrite) as folder:
            copy_companions(reference, folder)
            write_adapters(folder, reference)
        return
    config = complete_config(reference.config)
    source = reference.source()
    infos = {name: source.info(name) for name in source.names()}
    check_space(dst, sum(info.nbytes for info in infos.values()))
    write = write_hf if to == "hf" else write_run
    with replacing_folder(dst, overwrite) as folder:
        copy_companions(reference, folder)
        write(folder, config, infos, source.read)
        if to == "dcp":
            copy_recipe(reference, folder, dst)


def check_space(dst: Path, needed: int) -> None:
    """Raise `UserError` unless the file system of `dst` has `needed` bytes free."""
    parent = dst.parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise UserError(f"{dst} needs {needed / 1e9:.1f} GB, {parent} has {free / 1e9:.1f} GB free")


def write_hf(
    folder: Path, config: Mapping[str, Any], infos: Mapping[str, TensorInfo], read: Read
) -> None:
    """Write `config.json` and safetensors files of at most 5 GB each into an existing folder.

    A model of one of this project's classes gets a README that says which import loads it.

    Args:
        folder: the folder.
        config: the model's `config.json`; its dtype is set to that of the weights.
        infos: shape and dtype of every tensor.
        read: returns a tensor by its name; called once for each.

    Raises:
        UserError: the config ties two embeddings whose values differ.
    """
    check_ties(config, infos, read)
    promises = {name: infos[name].promise() for name in own_names(config, sorted(infos))}
    write_object(folder / CONFIG_FILE, _with_dtype(config, promises), sort_keys=True)
    write_loading_note(folder, str(config.get("model_type")))
    split = split_torch_state_dict_into_shards(promises, max_shard_size=MAX_SHARD_SIZE)
    for file, names in progress(split.filename_to_tensors.items(), "write safetensors"):
        own = {name: (infos[name].shape, infos[name].dtype) for name in names}
        write_safetensors(folder / file, own, read)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_object(folder / SAFETENSORS_INDEX, index, sort_keys=True)


def write_run(
    folder: Path, config: Mapping[str, Any], infos: Mapping[str, TensorInfo], read: Read
) -> None:
    """Write `config.json` and `checkpoint/step-0`, which holds the model alone.

    Arguments and errors are those of `write_hf`. A tied output embedding is written too, because
    trainers save it and look for it when they resume.
    """
    check_ties(config, infos, read)
    promises = {name: info.promise() for name, info in infos.items()}
    twin = input_embedding(infos) if is_tied(config) else None
    if twin is not None:
        promises.setdefault(OUTPUT_EMBEDDING, promises[twin])
    stored = {name: twin if name not in infos else name for name in promises}
    checkpoints = folder / CHECKPOINT_FOLDER
    save_step(promises, checkpoints, 0, read=lambda name: read(str(stored[name])), alone=True)
    write_object(folder / CONFIG_FILE, config, sort_keys=True)


def check_ties(config: Mapping[str, Any], infos: Mapping[str, TensorInfo], read: Read) -> None:
    """Raise `UserError` if the config ties two embeddings that differ: one would be lost."""
    twin = input_embedding(infos)
    if not is_tied(config) or OUTPUT_EMBEDDING not in infos or twin is None:
        return
    one, other = read(twin), read(OUTPUT_EMBEDDING)
    if one.dtype != other.dtype or not torch.equal(one.view(torch.uint8), other.view(torch.uint8)):
        raise UserError(
            f"config.json ties {OUTPUT_EMBEDDING} to {twin}, but their values differ: "
            "set tie_word_embeddings to false"
        )


def copy_companions(reference: ModelReference, folder: Path) -> None:
    """Copy tokenizer and generation config of a model into `folder`."""
    for name in COMPANION_FILES:
        path = reference.folder / name
        if path.is_file():
            shutil.copyfile(path, folder / name)


def copy_recipe(reference: ModelReference, folder: Path, dst: Path) -> None:
    """Copy a run's recipe, if it has one, into `folder`, as the recipe of a run in `dst`.

    The copy's dump folder is `dst`; it asks for no adapters and for no model to start from.
    """
    if reference.recipe is None:
        return
    from flame.config import job_from_tables
    from flame.recipe import read_tables, recipe_text

    job = job_from_tables(read_tables(reference.recipe))
    job.job.dump_folder = str(dst)
    job.lora = type(job.lora)()
    job.model.init = ""
    (folder / RECIPE_FILE).write_text(recipe_text(job))


def complete_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return `config` with the name of its stock class, which some loaders look for.

    Raises `UserError` if neither transformers nor fla knows the model family.
    """
    from transformers import AutoModelForCausalLM

    from flame.model import stock_config

    stock = stock_config(config)
    if config.get("architectures"):
        return config
    model_class = AutoModelForCausalLM._model_mapping.get(type(stock), None)
    return {**config, "architectures": [model_class.__name__]} if model_class else config


def _with_dtype(config: Mapping[str, Any], promises: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return `config` with the dtype of most of the weights, so that loading does not round."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in promises.values():
        if tensor.is_floating_point():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
    if not sizes:
        return dict(config)
    dtype = str(max(sizes, key=lambda key: sizes[key])).removeprefix("torch.")
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    return {**config, key: dtype}
