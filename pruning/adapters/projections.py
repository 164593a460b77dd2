"""What families with separate q, k, v and output projections have in common.

Their layers name tensors `model.layers.<i>.attn.<name>`: rows of the q, k and v projections and
convolutions are channels, heads one after another, and the output norm's weight is shared by all
heads. With grouped value heads each key head serves as many consecutive value heads as there are to
one key head, its group.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from flame.errors import UserError
from pruning.adapters.interface import Config
from pruning.spaces import Axis, Blocks, HeadMajor, Kind, Layout, Role, SharedHeads, Space

FLOAT32_BYTES = 4


@dataclass(frozen=True)
class Mixer:
    """Sizes of a family's recurrent layers, the same in all of them."""

    heads: int
    """Key heads."""
    value_heads: int
    key_width: int
    value_width: int
    short_conv: bool
    gate: bool
    """Whether an output gate, g_proj, has a row for each value channel."""
    per_value_head: tuple[tuple[str, Role], ...]
    """Tensors with one position along dimension 0 for each value head."""

    @property
    def state_bytes(self) -> int:
        """Bytes of one layer's recurrent state of one sequence, in float32."""
        return self.value_heads * self.key_width * self.value_width * FLOAT32_BYTES


class ProjectionFamily(ABC):
    """What the sizes of its recurrent layers say of a family; adapters extend it."""

    defaults: ClassVar[Mapping[str, object]]
    """Of the keys that a config may lack."""

    @abstractmethod
    def mixer(self, full: Config) -> Mixer:
        """The sizes of a config in which no key is absent."""

    def spaces(self, config: Config) -> list[Space]:
        """The spaces of every layer that is not softmax attention."""
        full = with_defaults(config, self.defaults)
        return mixer_spaces(linear_layers(full), self.mixer(full))

    def state_bytes(self, config: Config) -> int:
        """One state of d_k x d_v per value head and linear layer, in float32."""
        full = with_defaults(config, self.defaults)
        return len(linear_layers(full)) * self.mixer(full).state_bytes


def mixer_spaces(layers: Iterable[int], mixer: Mixer) -> list[Space]:
    """Key channels, value channels and heads of every one of `layers`."""
    heads, d_k, d_v = mixer.heads, mixer.key_width, mixer.value_width
    found = []
    for layer in layers:
        axes_of = {
            "key": _key_axes(layer, mixer),
            "value": _value_axes(layer, mixer),
            "head": _head_axes(layer, mixer),
        }
        found += [
            _space(layer, "key", heads, d_k, axes_of["key"]),
            _space(layer, "value", 1, d_v, axes_of["value"]),
            _space(layer, "head", 1, heads, axes_of["head"]),
        ]
    return found


def _space(layer: int, kind: Kind, heads: int, width: int, axes: Iterable[Axis]) -> Space:
    return Space(f"layers.{layer}.{kind}", kind, layer, heads, width, tuple(axes))


def _key_axes(layer: int, mixer: Mixer) -> list[Axis]:
    return _rows(layer, "qk", HeadMajor(mixer.heads, mixer.key_width), mixer)


def _value_axes(layer: int, mixer: Mixer) -> list[Axis]:
    layout = SharedHeads(mixer.value_heads, mixer.value_width)
    norm = _axis(layer, "o_norm.weight", 0, SharedHeads(1, mixer.value_width), "norm")
    return [*_value_tensors(layer, layout, mixer), norm]


def _head_axes(layer: int, mixer: Mixer) -> list[Axis]:
    heads, group = mixer.heads, mixer.value_heads // mixer.heads
    values = Blocks(heads, group * mixer.value_width)
    return [
        *_rows(layer, "qk", Blocks(heads, mixer.key_width), mixer),
        *_value_tensors(layer, values, mixer),
        *(_axis(layer, name, 0, Blocks(heads, group), r) for name, r in mixer.per_value_head),
    ]


def _value_tensors(layer: int, layout: Layout, mixer: Mixer) -> list[Axis]:
    """Everything that has a position for each channel of each value head."""
    gate = [_axis(layer, "g_proj.weight", 0, layout)] if mixer.gate else []
    out = _axis(layer, "o_proj.weight", 1, layout)
    return [*_rows(layer, "v", layout, mixer), *gate, out]


def _rows(layer: int, names: str, layout: Layout, mixer: Mixer) -> list[Axis]:
    """Projections, then convolutions, of q, k or v."""
    axes = [_axis(layer, f"{name}_proj.weight", 0, layout) for name in names]
    if mixer.short_conv:
        axes += [_axis(layer, f"{n}_conv1d.weight", 0, layout, "convolution") for n in names]
    return axes


def _axis(layer: int, name: str, dim: int, layout: Layout, role: Role = "projection") -> Axis:
    return Axis(f"model.layers.{layer}.attn.{name}", dim, layout, role)


def with_defaults(config: Config, defaults: Mapping[str, object]) -> Config:
    """A copy of `config` in which absent keys have the family's defaults."""
    return {**defaults, **config}


def positive_integer(config: Config, key: str) -> int:
    """`config[key]`, if it is a positive integer; UserError otherwise."""
    value = config[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"config: {key} is {value!r}, expected a positive integer")
    return value


def positive_number(config: Config, key: str) -> float:
    """`config[key]`, if it is a positive finite number; UserError otherwise."""
    value = config[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UserError(f"config: {key} is {value!r}, expected a positive number")
    return value


def linear_layers(config: Config) -> list[int]:
    """The layers that have a recurrent state: those that `config["attn"]` does not name."""
    specifications = config.get("attn") or []
    if isinstance(specifications, dict):
        specifications = [specifications]
    for specification in specifications:
        if not isinstance(specification, dict) or not isinstance(specification.get("layers"), list):
            raise UserError(f"config: attn is {specification!r}, expected a dict with its layers")
    softmax = {layer for specification in specifications for layer in specification["layers"]}
    return [layer for layer in range(config["num_hidden_layers"]) if layer not in softmax]


def check_layers(config: Config) -> None:
    """Raise UserError if there is nothing to prune.

    fla's models make convolutions without a bias whatever the config's `conv_bias` is; that the
    checkpoint has none is looked at when it is sliced.
    """
    positive_integer(config, "num_hidden_layers")
    if not linear_layers(config):
        raise UserError("config: attn names every layer, so there is no linear-attention layer")
