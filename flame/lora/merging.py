"""Merging the adapters of one module into its weight, by peft's own code for it."""

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from flame.errors import UserError, first_line
from flame.lora.config import PEFT_ERRORS, AdapterConfig
from flame.lora.names import PEFT_PREFIX


def merge_module(
    config: AdapterConfig, module: str, base: Mapping[str, Tensor], entries: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the parameters of a module with its adapters merged.

    The sums are in the dtype of `base`. A part of the rows may be merged by itself where
    `config.row_by_row`: then `base` and all of `entries` but A are those rows.

    Args:
        config: what kind of adapters they are.
        module: the module's name in the model, such as `model.layers.0.attn.q_proj`.
        base: the module's `weight` `[out, in]`, and its `bias` `[out]` if it has one.
        entries: the module's tensors in peft's adapter file, by the part of their names that comes
            after the module's.

    Raises:
        UserError: peft refuses the adapters, or does not know one of the tensors.
    """
    from peft import get_peft_model, set_peft_model_state_dict

    tree = _tree(module, _layer(module, base, entries))
    options = config.for_module(module)
    stored = {f"{PEFT_PREFIX}{module}.{name}": tensor for name, tensor in entries.items()}
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.no_grad():
            warnings.simplefilter("ignore")
            adapted = get_peft_model(tree, options)  # type: ignore[arg-type]
            unknown = set_peft_model_state_dict(adapted, stored).unexpected_keys
            if unknown:
                raise UserError(f"the adapters hold {unknown[0]}, which peft does not know")
            merged = adapted.merge_and_unload().get_submodule(module)
    except PEFT_ERRORS as error:
        raise UserError(f"peft refuses the adapters of {module}: {first_line(error)}") from error
    return {name: parameter.detach() for name, parameter in merged.named_parameters()}


def _layer(module: str, base: Mapping[str, Tensor], entries: Mapping[str, Tensor]) -> nn.Module:
    """Return a layer with the parameters `base`: an embedding or a linear module."""
    weight, bias = base["weight"], base.get("bias")
    if weight.dim() != 2:
        raise UserError(
            f"the adapters change {module}, whose weight has {weight.dim()} dimensions: only "
            "adapters of linear modules and embeddings can be merged"
        )
    layer: nn.Module
    with torch.device("meta"):
        if any(name.startswith("lora_embedding_") for name in entries):
            layer = nn.Embedding(*weight.shape)
        else:
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    # The merge works in place.
    values = {name: nn.Parameter(tensor.clone(), False) for name, tensor in base.items()}
    layer.load_state_dict(values, assign=True)
    return layer


def _tree(module: str, layer: nn.Module) -> nn.Module:
    """Return a model that has `layer` under the name `module`, and nothing else."""
    root = node = nn.Module()
    *path, last = module.split(".")
    for part in path:
        node.add_module(part, child := nn.Module())
        node = child
    node.add_module(last, layer)
    return root
