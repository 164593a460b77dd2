"""The token mixers of a model, and the parts of them that families name differently."""

import importlib

from torch import nn

from pruning.adapters.interface import Adapter


def find_mixers(model: nn.Module, adapter: Adapter) -> dict[int, nn.Module]:
    """The linear-attention mixers of `model` by layer index; softmax layers are not among them.

    Raises:
        ValueError: the model has none, so it is not of the adapter's family.
    """
    module, name = adapter.mixer_class
    mixer_class = getattr(importlib.import_module(module), name)
    found = {int(m.layer_idx): m for m in model.modules() if isinstance(m, mixer_class)}
    if not found:
        raise ValueError(f"{type(model).__name__} has no {name} layer to tap")
    return dict(sorted(found.items()))


def output_norm(mixer: nn.Module) -> nn.Module:
    """The norm between a mixer's delta rule and its output projection."""
    return getattr(mixer, "o_norm", None) or mixer.get_submodule("norm")


def output_projection(mixer: nn.Module) -> nn.Module:
    """A mixer's output projection."""
    return getattr(mixer, "o_proj", None) or mixer.get_submodule("out_proj")
