"""Weights from any source into a model, sharded or not, one slice of one tensor at a time."""

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from flame.checkpoint.source import TensorSource
from flame.errors import UserError
from flame.hugging_face.model_folder import check_tie
from flame.hugging_face.stock_form import complain
from flame.lora.names import base_name, is_adapter
from flame.models.gpu_limits import check_dtype
from flame.process.progress import phase, progress

if TYPE_CHECKING:
    from flame.checkpoint.reference import ModelReference


@torch.no_grad()
def load_weights(model: nn.Module, source: TensorSource) -> None:
    """Copy every parameter and saved buffer of `model` from `source`, cast to the model's dtypes.

    A rank reads only its own rows of a DTensor. Adapters in the model keep their values; the layers
    under them are loaded. Of tied tensors one is enough. Not collective.

    Args:
        model: not on the meta device; sharded by FSDP2 or plain.
        source: holds exactly the model's tensors.

    Raises:
        UserError: the source lacks tensors, has more of them, has one of another shape, or has tied
            tensors that differ.
    """
    targets, stored = _matched(model, source)
    available = set(source.names())
    for twin, own in _ties(model).items():
        if twin in targets and {twin, own} <= available:
            check_tie(twin, own, partial(_part, targets[twin], source))
    for name, target in progress(targets.items(), "load weights", len(targets)):
        _copy(target, stored[name], source)


def check_weights(model: nn.Module, source: TensorSource) -> None:
    """Raise `UserError` unless names and shapes of `source` fit `model`, which may be meta."""
    _matched(model, source)


def load_model(
    reference: "ModelReference",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """Return the model of `reference` in its stock class, in evaluation mode, whole on one device.

    Weights are cast to `dtype`, but those that FSDP2 would leave in fp32 stay in fp32: a model
    computes the same whether it is loaded here or by `build_sharded`.
    """
    from flame.model import full_precision_parameters, meta_model

    check_dtype(reference.config, dtype if torch.device(device).type == "cuda" else "auto")
    with phase("building the model"):
        model = meta_model(reference.config)
    kept = full_precision_parameters(model)
    for name, parameter in model.named_parameters():
        if name not in kept:
            parameter.data = parameter.data.to(dtype)
    return filled(model, reference.source(), device)


def build_sharded(
    reference: "ModelReference", mesh: DeviceMesh, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """Return the model of `reference` in evaluation mode, sharded over `mesh`. Collective.

    The weights stay in fp32 and compute in `dtype`. A rank reads only its own rows, of files whose
    hashes the ranks have compared together.

    Raises:
        UserError: on every rank, if the weights are damaged or those of another model.
    """
    from flame.checkpoint.verify import verify_model
    from flame.model import meta_model, shard
    from flame.process.distributed import local_device
    from flame.process.peers import Peers

    check_dtype(reference.config, dtype)
    verify_model(reference)
    with phase("building the model"):
        model = shard(meta_model(reference.config), mesh, dtype)
    return Peers().agree(lambda: filled(model, reference.source(), local_device()))


def filled(model: nn.Module, source: TensorSource, device: torch.device | str) -> nn.Module:
    """`model`, which is on the meta device, on `device` and in evaluation mode with these weights.

    Not collective; a rank of a sharded model reads its own rows.
    """
    from flame.model import restore_after_to_empty

    model.to_empty(device=device)
    restore_after_to_empty(model)
    load_weights(model, source)
    return model.eval()


def _matched(model: nn.Module, source: TensorSource) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the model's tensors by name, and the name in `source` of what each is filled with."""
    targets, available = _targets(model), set(source.names())
    stored = {name: name for name in targets if name in available}
    for twin, own in _ties(model).items():
        if own in available and twin in targets:
            stored[twin] = own
        elif twin in available and own in targets:
            stored[own] = twin
    used = stored.keys() | set(stored.values())
    complain(targets.keys() - stored.keys(), available - used)
    for name, place in stored.items():
        found, wanted = source.info(place).shape, tuple(targets[name].shape)
        if found != wanted:
            raise UserError(
                f"the checkpoint's {place} has shape {found}, config.json asks for {wanted}"
            )
    return targets, stored


def _targets(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors to be filled, by their names in a model without adapters."""
    named: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    saved = _saved_buffers(model)
    named |= {name: buffer for name, buffer in model.named_buffers() if name in saved}
    return {base_name(name): tensor for name, tensor in named.items() if not is_adapter(name)}


def _saved_buffers(model: nn.Module) -> set[str]:
    """Return the names of the buffers that a state dict holds (`persistent=True`)."""
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name in module._buffers
        if name not in module._non_persistent_buffers_set
    }


def _ties(model: nn.Module) -> dict[str, str]:
    """Return the names of tied tensors, and of those that they repeat."""
    known = getattr(model, "get_expanded_tied_weights_keys", None)
    return known(all_submodels=True) if known else {}


def _copy(target: Tensor, name: str, source: TensorSource) -> None:
    """Fill `target`, or this rank's part of a DTensor, with tensor `name` of `source`."""
    local = target.to_local() if isinstance(target, DTensor) else target
    if local.numel() > 0:
        local.copy_(_part(target, source, name))


def _part(target: Tensor, source: TensorSource, name: str) -> Tensor:
    """Return tensor `name` of `source`, or the part of it that this rank has of a DTensor."""
    if not isinstance(target, DTensor):
        return source.read(name)
    if target.to_local().numel() == 0:
        return target.to_local()
    chunk = target.__create_chunk_list__()[0]
    begins, sizes = list(chunk.offsets), list(chunk.sizes)
    value = source.read(name, slice(begins[0], begins[0] + sizes[0]) if sizes else None)
    for dim in range(1, value.dim()):
        value = value.narrow(dim, begins[dim], sizes[dim])
    return value
