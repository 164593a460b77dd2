"""A Hugging Face folder as transformers loads it; one written as it saves it, and read back."""

import logging
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
import xxhash
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from flame.checkpoint.source import Read, TensorInfo, TensorSource
from flame.errors import UserError, some
from flame.hugging_face.config_file import CONFIG_FILE, dequantise_advice
from flame.hugging_face.regrouped_source import Group, PromisedTensors, RegroupedSource
from flame.hugging_face.safetensors_source import (
    SAFETENSORS_INDEX,
    SafetensorsSource,
    weights_name,
)
from flame.hugging_face.stock_form import StockForm, stock_form
from flame.process.progress import progress
from flame.storage.json_file import write_object
from flame.storage.safetensors_file import write_safetensors

MAX_SHARD_SIZE = "5GB"

log = logging.getLogger(__name__)


class HasInfos(Protocol):
    """The part of a source that tells what will be written."""

    def names(self) -> list[str]: ...

    def info(self, name: str) -> TensorInfo: ...


_QUANTISED = (
    "weight_scale", "weight_scale_inv", "weight_packed", "weight_zero_point", "input_scale",
    "absmax", "quant_map", "qweight", "qzeros", "scales", "g_idx", "SCB", "qdata",
)  # fmt: skip
"""Last parts of the names that quantised checkpoints have beside or in place of weights."""


def open_folder(folder: Path, config: Mapping[str, Any]) -> TensorSource:
    """Return a folder's tensors as transformers loads them, under the stock class's names.

    A tied embedding comes under one name, whichever of the two is stored. Tensors that the class
    has no use for come under their own names, but for those that transformers too leaves out
    without a warning.

    Raises:
        UserError: the weights are missing, damaged or quantised, or tied embeddings differ.
    """
    stored = SafetensorsSource(folder, weights_name(config))
    form = stock_form(config)
    groups = {group.name: group for group in form.on_load(stored.names())}
    unused = tuple(name for name in groups if form.is_unused(name))
    _say_unused(folder, unused)
    for name in unused:
        del groups[name]
    _check_plain(folder, stored, form, groups.values())
    for twin, own in form.ties.items():
        if twin not in groups:
            continue
        if own in groups:
            both = RegroupedSource(stored, [groups[own], groups[twin]])
            check_tie(twin, own, both.read)
        else:
            groups[own] = Group(groups[twin].sources, own)
        del groups[twin]
    return RegroupedSource(stored, list(groups.values()))


def write_hf(
    folder: Path, config: Mapping[str, Any], infos: Mapping[str, TensorInfo], read: Read
) -> None:
    """Write `config.json` and safetensors files of at most 5 GB each into an existing folder.

    Names on the disk are those under which transformers saves the class. What was written is read
    back and compared.

    Args:
        folder: the folder.
        config: the model's `config.json`; its dtype is set to that of the weights.
        infos: shape and dtype of every tensor, under the stock class's names.
        read: returns a tensor by its name; called once for each, twice for tied embeddings.

    Raises:
        UserError: the tensors do not fit the config, two tied ones differ, or the disk gives back
            something else than what was written.
    """
    form = stock_form(config)
    form.check(infos)
    check_ties(form, infos, read)
    own = {name: infos[name] for name in sorted(infos) if form.ties.get(name) not in infos}
    record = Recorded(read)
    disk = RegroupedSource(PromisedTensors(own, record), form.on_save(own))
    written = with_dtype(config, [disk.info(name).promise() for name in disk.names()])
    write_files(folder, written, disk, disk.read)
    record.check(open_folder(folder, written), form.ties)


def write_files(folder: Path, config: Mapping[str, Any], disk: HasInfos, read: Read) -> None:
    """Write `config.json` and the tensors of `disk`, read by `read`, into an existing folder."""
    write_object(folder / CONFIG_FILE, config, sort_keys=True)
    promises = {name: disk.info(name).promise() for name in disk.names()}
    split = split_torch_state_dict_into_shards(promises, max_shard_size=MAX_SHARD_SIZE)
    for file, names in progress(split.filename_to_tensors.items(), "write safetensors"):
        forms = {name: (disk.info(name).shape, disk.info(name).dtype) for name in names}
        write_safetensors(folder / file, forms, read)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_object(folder / SAFETENSORS_INDEX, index, sort_keys=True)


def check_ties(form: StockForm, names: Container[str], read: Read) -> None:
    """Raise `UserError` if two of the tensors `names` are tied and differ: one would be lost."""
    for twin, own in form.ties.items():
        if twin in names and own in names:
            check_tie(twin, own, read)


def check_tie(twin: str, own: str, read: Read) -> None:
    """Raise `UserError` unless two tied tensors have the same values."""
    one, other = read(own), read(twin)
    dtype = torch.promote_types(one.dtype, other.dtype)
    if one.shape != other.shape or not _equal(one.to(dtype), other.to(dtype)):
        raise UserError(
            f"config.json ties {twin} to {own}, but their values differ: set tie_word_embeddings "
            "to false"
        )


@dataclass
class Recorded:
    """Reads tensors and keeps a hash of each, to compare with what comes back from a disk."""

    whole: Read
    hashes: dict[str, str] = field(default_factory=dict)

    def __call__(self, name: str) -> Tensor:
        tensor = self.whole(name)
        self.hashes[name] = _hash(tensor)
        return tensor

    def check(self, source: TensorSource, ties: Mapping[str, str]) -> None:
        """Raise `UserError` unless `source` has the tensors that were read, bit for bit.

        Args:
            source: what was written.
            ties: names of tied tensors, and of those that they repeat; one of the two may lack.
        """
        wanted = dict(self.hashes)
        for twin, own in ties.items():
            if twin in wanted:
                wanted.setdefault(own, wanted.pop(twin))
        found = set(source.names()) - ties.keys()
        changed = sorted(wanted.keys() ^ found)
        for name in progress(sorted(wanted.keys() & found), "compare what was written"):
            if _hash(source.read(name)) != wanted[name]:
                changed.append(name)
        if changed:
            raise UserError(
                f"{some(changed, 3)} came back from the disk changed, so nothing is kept: check "
                "the disk, or write to another"
            )


def _hash(tensor: Tensor) -> str:
    plain = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    head = f"{tuple(tensor.shape)} {tensor.dtype} "
    return head + xxhash.xxh3_128_hexdigest(memoryview(plain.numpy()))


def _equal(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


@cache
def _say_unused(folder: Path, names: tuple[str, ...]) -> None:
    """Say once that parts of a checkpoint, such as a tower for images, are left out."""
    names = tuple(name for name in names if not name.endswith((".inv_freq", ".position_ids")))
    if names:
        log.warning(
            "slimstate: note: %s has tensors for which a causal language model has no use, so they "
            "are left out (a Hugging Face folder written of it keeps a vision tower and an MTP "
            "head): %s",
            folder,
            some(names, 3),
        )


def _check_plain(
    folder: Path, source: SafetensorsSource, form: StockForm, groups: Iterable[Group]
) -> None:
    """Raise `UserError` if a weight is stored in a quantised form."""
    for group in groups:
        if group.name not in form.shapes and group.name.split(".")[-1] in _QUANTISED:
            raise UserError(f"{folder} is quantised: it holds {group.name}; {dequantise_advice()}")
        if group.name not in form.floating:
            continue
        for name in group.sources:
            dtype = source.info(name).dtype
            if not dtype.is_floating_point or dtype.itemsize == 1:
                kind = str(dtype).removeprefix("torch.")
                raise UserError(
                    f"{folder} is quantised: {name} is of dtype {kind}; {dequantise_advice()}"
                )


def with_dtype(config: Mapping[str, Any], promises: Iterable[Tensor]) -> dict[str, Any]:
    """Return `config` with the dtype of most of the weights, so that loading does not round."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in promises:
        if tensor.is_floating_point():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
    if not sizes:
        return dict(config)
    dtype = str(max(sizes, key=lambda key: sizes[key])).removeprefix("torch.")
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    return {**config, key: dtype}
