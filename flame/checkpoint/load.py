"""Weights from any source into a model, sharded or not, one slice of one tensor at a time."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from flame.checkpoint.adapter_names import base_name, is_adapter
from flame.checkpoint.source import TensorSource
from flame.checkpoint.ties import OUTPUT_EMBEDDING, input_embedding
from flame.errors import UserError, some
from flame.process.progress import progress

if TYPE_CHECKING:
    from flame.checkpoint.reference import ModelReference


@torch.no_grad()
def load_weights(model: nn.Module, source: TensorSource, strict: bool = True) -> None:
    """Copy every parameter and saved buffer of `model` from `source`; values are cast.

    A rank reads only the rows that it holds of a DTensor. Adapters in the model are left as they
    are, the layers that they sit on are loaded. An output embedding that the source does not hold
    is filled from the input embedding if the model ties them. Not collective.

    Args:
        model: materialised; FSDP2-sharded or plain.
        strict: refuse a source with more or fewer tensors; otherwise load what both have.

    Raises:
        UserError: tensors are missing, unexpected or of another shape.
    """
    targets = _targets(model)
    places = _places(model, targets, source)
    _check(targets, places, source, strict)
    for name, stored in progress(places.items(), "load weights", len(places)):
        _copy(targets[name], stored, source)


def check_weights(model: nn.Module, source: TensorSource) -> None:
    """Raise `UserError` unless `source` has what `model` takes, by name and shape; reads none.

    Args:
        model: may be on the meta device.
        source: what `load_weights` would be given.
    """
    targets = _targets(model)
    _check(targets, _places(model, targets, source), source, strict=True)


def load_model(
    reference: "ModelReference",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """Return the model of `reference` in its stock class, in evaluation mode, whole on one device.

    Weights are cast to `dtype`, but those that FSDP2 would leave in fp32 stay in fp32: a model
    computes the same whether it is loaded here or by `build_sharded`.
    """
    from flame.model import full_precision_parameters, meta_model, restore_after_to_empty

    model = meta_model(reference.config)
    kept = full_precision_parameters(model)
    for name, parameter in model.named_parameters():
        if name not in kept:
            parameter.data = parameter.data.to(dtype)
    model.to_empty(device=device)
    restore_after_to_empty(model)
    load_weights(model, reference.source())
    return model.eval()


def build_sharded(
    reference: "ModelReference", mesh: DeviceMesh, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """The model of `reference` in evaluation mode, sharded over `mesh`, computing in `dtype`.

    Collective over the mesh. The weights are read tensor by tensor, slice by slice.
    """
    from flame.model import meta_model, restore_after_to_empty, shard
    from flame.process.distributed import local_device

    model = shard(meta_model(reference.config), mesh, dtype)
    model.to_empty(device=local_device())
    restore_after_to_empty(model)
    load_weights(model, reference.source())
    return model.eval()


def _targets(model: nn.Module) -> dict[str, Tensor]:
    """The tensors to be filled, by their names in a model without adapters."""
    buffers = {name: b for name, b in model.named_buffers() if name in _saved_names(model)}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    named = {**parameters, **buffers}
    return {base_name(name): tensor for name, tensor in named.items() if not is_adapter(name)}


def _saved_names(model: nn.Module) -> set[str]:
    """Names of the buffers that a state dict holds (`persistent=True`)."""
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name in module._buffers
        if name not in module._non_persistent_buffers_set
    }


def _places(model: nn.Module, targets: dict[str, Tensor], source: TensorSource) -> dict[str, str]:
    """The name in `source` of what each target is filled with."""
    stored = set(source.names())
    places = {name: name for name in targets if name in stored}
    config = getattr(model, "config", None)
    embedding = input_embedding(stored)
    if getattr(config, "tie_word_embeddings", False) and embedding is not None:
        if OUTPUT_EMBEDDING in targets:
            places[OUTPUT_EMBEDDING] = embedding
    return places


def _check(
    targets: dict[str, Tensor], places: dict[str, str], source: TensorSource, strict: bool
) -> None:
    if strict:
        _check_names(targets, places, source)
    _check_shapes(targets, places, source)


def _check_names(targets: dict[str, Tensor], places: dict[str, str], source: TensorSource) -> None:
    missing = sorted(set(targets) - set(places))
    unexpected = sorted(set(source.names()) - set(places) - set(places.values()))
    complaints = [f"lacks {some(missing, 5)}"] if missing else []
    complaints += [f"has {some(unexpected, 5)}, which the model does not"] if unexpected else []
    if complaints:
        raise UserError(f"the checkpoint {' and '.join(complaints)}: is config.json its own?")


def _check_shapes(targets: dict[str, Tensor], places: dict[str, str], source: TensorSource) -> None:
    for name, stored in places.items():
        found, wanted = source.info(stored).shape, tuple(targets[name].shape)
        if found != wanted:
            raise UserError(
                f"the checkpoint's {stored} has shape {found}, config.json asks for {wanted}"
            )


def _copy(target: Tensor, name: str, source: TensorSource) -> None:
    if not isinstance(target, DTensor):
        target.copy_(source.read(name))
        return
    local = target.to_local()
    if local.numel() == 0:
        return
    chunk = target.__create_chunk_list__()[0]
    value = source.read(name, _rows(chunk.offsets, chunk.sizes))
    for dim in range(1, value.dim()):
        value = value.narrow(dim, chunk.offsets[dim], chunk.sizes[dim])
    local.copy_(value)


def _rows(offsets: Iterable[int], sizes: Iterable[int]) -> slice | None:
    offsets, sizes = list(offsets), list(sizes)
    return slice(offsets[0], offsets[0] + sizes[0]) if sizes else None
