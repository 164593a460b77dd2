"""Widths that differ between layers and heads: what the `widths` of a slim model's config say.

A slim config has the keys of the dense stock model, which give its full widths, and

    "widths": {"key": [[16, 32], null, [16, 16]],   key channels of each key head, by layer
               "value": [48, null, 32],             value channels of every head, by layer
               "heads": [2, null, 2]}               key heads, by layer

with an entry for each layer, null for softmax layers, which have no recurrent state. A list that is
absent stands for the full widths. With grouped value heads each key head keeps its whole group.

With K of the dense model's D key channels, the delta rule's default scale of K^-1/2 makes a head's
output sqrt(D / K) times as large as zeros in the other channels would. `"undo_gain": true` in the
config gives every head the dense model's scale instead, and the output norm of a layer with V of D
value channels the dense eps times D / V; the norm's weight holds the factor sqrt(D / V) already.
This module imports no torch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

KINDS = ("key", "value", "heads")

KERNEL_WIDTHS = range(16, 257)
"""Key widths that fla's CUDA kernels take."""


def kernel_warning(width: int) -> str | None:
    """One sentence if fla's CUDA kernels do not take this key width, else None."""
    if width in KERNEL_WIDTHS:
        return None
    return (
        f"fla's CUDA kernels take {KERNEL_WIDTHS.start} to {KERNEL_WIDTHS.stop - 1} key channels "
        f"per head, not {width}: the model will run on a CPU only"
    )


@dataclass(frozen=True)
class DenseShape:
    """The full widths of a family's layers, the same in all of them."""

    heads: int
    key: int
    value: int
    group: int = 1


@dataclass(frozen=True)
class LayerWidths:
    """The shape of one layer's recurrent state, and what follows from it for the layer's scales."""

    keys: tuple[int, ...]
    """Key channels of each key head, in the order of the heads."""
    value: int
    """Value channels of every value head."""
    group: int = 1
    """Value heads that share a key head."""
    undone: DenseShape | None = None
    """The dense model's shape if the layer undoes the gain of fewer channels; None if it has it."""

    @property
    def scale(self) -> float | None:
        """The scale of the queries; None for the operator's default, each head's width^-1/2."""
        return None if self.undone is None else self.undone.key**-0.5

    @property
    def norm_eps_factor(self) -> float:
        """What the output norm's eps is multiplied by."""
        return 1.0 if self.undone is None else self.undone.value / self.value

    @property
    def heads(self) -> int:
        return len(self.keys)

    @property
    def value_heads(self) -> int:
        return self.heads * self.group

    @property
    def key_rows(self) -> int:
        """Rows of q_proj and k_proj."""
        return sum(self.keys)

    @property
    def value_rows(self) -> int:
        """Rows of v_proj."""
        return self.value_heads * self.value

    @property
    def state_floats(self) -> int:
        """Numbers in the layer's recurrent state of one sequence."""
        return self.key_rows * self.group * self.value


def delta_net_shape(config: Mapping[str, Any]) -> DenseShape:
    """Full widths of a `delta_net` config that has all its keys."""
    heads, hidden = config["num_heads"], config["hidden_size"]
    key, value = round(hidden * config["expand_k"]), round(hidden * config["expand_v"])
    return DenseShape(heads, key // heads, value // heads)


def gated_deltanet_shape(config: Mapping[str, Any]) -> DenseShape:
    """Full widths of a `gated_deltanet` config that has all its keys."""
    heads, key = config["num_heads"], config["head_dim"]
    value_heads = config["num_v_heads"] or heads
    return DenseShape(heads, key, int(key * config["expand_v"]), value_heads // heads)


SHAPES: dict[str, Callable[[Mapping[str, Any]], DenseShape]] = {
    "slim_delta_net": delta_net_shape,
    "slim_gated_deltanet": gated_deltanet_shape,
}
"""How the stock keys of a slim family's config give the full widths, by `model_type`."""


def slim_config(
    dense: Mapping[str, Any], widths: Mapping[str, Any], undo_gain: bool = False
) -> dict[str, Any]:
    """The config of the slim form of a dense stock model; not checked yet.

    Args:
        dense: the stock model's config.json.
        widths: as in the module's text; lists that say nothing new may be left out.
        undo_gain: as in the module's text.
    """
    kept = {key: value for key, value in dense.items() if key != "architectures"}
    undo = {"undo_gain": True} if undo_gain else {}
    return {**kept, "model_type": f"slim_{dense['model_type']}", "widths": dict(widths), **undo}


def layer_widths(config: Mapping[str, Any]) -> dict[int, LayerWidths]:
    """The widths of each layer with a recurrent state, by layer, of a complete slim config.

    Raises:
        ValueError: `widths` or `undo_gain` is not what the module's text describes, or a width is
            not from 1 to the full one; the message names the entry.
    """
    dense = SHAPES[config["model_type"]](config)
    widths = config.get("widths") or {}
    if not isinstance(widths, Mapping) or not set(widths) <= set(KINDS):
        raise ValueError(f"widths is {widths!r}: it must map some of {', '.join(KINDS)} to lists")
    depth, layers = config["num_hidden_layers"], recurrent_layers(config)
    for kind, values in widths.items():
        _check_layers(kind, values, depth, layers)
    undo = config.get("undo_gain", False)
    if type(undo) is not bool:
        raise ValueError(f"undo_gain is {undo!r}: it must be true or false")
    return {layer: _layer(widths, layer, dense, dense if undo else None) for layer in layers}


def recurrent_layers(config: Mapping[str, Any]) -> list[int]:
    """The layers that `attn` does not name."""
    specifications = config.get("attn") or []
    if isinstance(specifications, Mapping):
        specifications = [specifications]
    softmax = {layer for each in specifications for layer in each["layers"]}
    return [layer for layer in range(config["num_hidden_layers"]) if layer not in softmax]


def _layer(
    widths: Mapping[str, Any], layer: int, dense: DenseShape, undone: DenseShape | None
) -> LayerWidths:
    heads = _number(widths, "heads", layer, dense.heads)
    value = _number(widths, "value", layer, dense.value)
    if "key" not in widths:
        return LayerWidths((dense.key,) * heads, value, dense.group, undone)
    keys = widths["key"][layer]
    if not isinstance(keys, Sequence) or isinstance(keys, str) or len(keys) != heads:
        raise ValueError(f"widths.key[{layer}] is {keys!r}: it must be a list of {heads} widths")
    for head, key in enumerate(keys):
        _check_range(f"widths.key[{layer}][{head}]", key, dense.key)
    return LayerWidths(tuple(keys), value, dense.group, undone)


def _number(widths: Mapping[str, Any], kind: str, layer: int, full: int) -> int:
    if kind not in widths:
        return full
    _check_range(f"widths.{kind}[{layer}]", widths[kind][layer], full)
    return int(widths[kind][layer])


def _check_range(name: str, width: Any, full: int) -> None:
    if type(width) is not int or not 1 <= width <= full:
        raise ValueError(f"{name} is {width!r}: it must be a whole number from 1 to {full}")


def _check_layers(kind: str, values: Any, depth: int, recurrent: list[int]) -> None:
    if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != depth:
        raise ValueError(f"widths.{kind} is {values!r}: it must be a list of {depth} layers")
    for layer in set(range(depth)) - set(recurrent):
        if values[layer] is not None:
            raise ValueError(
                f"widths.{kind}[{layer}] is {values[layer]!r}: it must be null, "
                "since layer "
                f"{layer} is softmax attention"
            )
