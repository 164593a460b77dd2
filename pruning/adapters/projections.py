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
from flame.models.widths import recurrent_layers
from pruning.adapters.interface import Config, States, Widths
from pruning.adapters.widths import ragged_config, uniform_sizes, widths_by_kind
from pruning.layouts import Blocks, GroupedBlocks, HeadMajor, Layout, SharedHeads
from pruning.spaces import Axis, Kind, Role, Space


@dataclass(frozen=True)
class MixerSizes:
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
    def group(self) -> int:
        """Value heads of a key head."""
        return self.value_heads // self.heads


class ProjectionFamily(ABC):
    """Base of adapters whose spaces follow from the sizes of their recurrent layers."""

    model_type: str
    defaults: ClassVar[Mapping[str, object]]
    """What fla assumes for keys that a config lacks."""
    has_slim_class: ClassVar[bool] = False
    """Whether `flame.models` has a class for widths that differ between heads or layers."""
    can_undo_gain: ClassVar[bool] = True
    value_heads_key: ClassVar[str | None] = None
    tied_width: ClassVar[str] = ""
    """The config's key that is both the key and the value width, if one is."""
    eps_key: ClassVar[str] = "norm_eps"
    """The config's key of the eps of all norms."""

    @abstractmethod
    def sizes(self, full: Config) -> MixerSizes:
        """The sizes that a config in which no key is absent leads to."""

    @abstractmethod
    def knobs(self, full: Config, sizes: Mapping[Kind, int]) -> Config:
        """The keys of a complete config that change for these sizes, with their new values."""

    def linear_layers(self, full: Config) -> list[int]:
        """The layers of a complete config that have a recurrent state."""
        return linear_layers(full)

    def spaces(self, config: Config) -> list[Space]:
        """The spaces of every layer that is not softmax attention."""
        full = with_defaults(config, self.defaults)
        return mixer_spaces(self.linear_layers(full), self.sizes(full))

    def resize(self, config: Config, widths: Widths, undo_gain: bool = False) -> Config:
        """A copy of the config for what is kept; of the slim class where heads or layers differ.

        Raises:
            ValueError: as `Adapter.resize` says.
        """
        planned = widths_by_kind(self.spaces(config), widths)
        full = with_defaults(config, self.defaults)
        sizes = uniform_sizes(planned)
        if sizes is not None:
            gain = self._gain_knob(full, sizes) if undo_gain else {}
            return {**config, **self.knobs(full, sizes), **gain}
        if "value-head" in planned:
            raise ValueError(
                "every key head must keep as many value heads where some go: use --allocate uniform"
            )
        if not self.has_slim_class:
            raise ValueError(
                f"widths differ between layers or heads, and {self.model_type} has no class for "
                "that: use --allocate uniform, or --pad for a stock model with channels of zeros"
            )
        return ragged_config(config, planned, full["num_hidden_layers"], undo_gain)

    def _gain_knob(self, full: Config, sizes: Mapping[Kind, int]) -> Config:
        """The output norm's eps, by which d'_k of d_k key and d'_v of d_v value channels act alike.

        The output o of d'_k channels is sqrt(d_k / d'_k) times what zeros in the dropped ones give,
        and the mean of o² over d'_v channels d_v / d'_v times that over all. With the eps times
        both ratios, and the norm's weight times sqrt(d_v / d'_v), the norm's output is the same.
        """
        before = self.sizes(full)
        key = before.key_width / sizes.get("key", before.key_width)
        value = before.value_width / sizes.get("value", before.value_width)
        return {} if key * value == 1 else {self.eps_key: full[self.eps_key] * key * value}

    def states(self, config: Config) -> list[States]:
        """One state of d_k x d_v per value head and linear layer."""
        full = with_defaults(config, self.defaults)
        sizes = self.sizes(full)
        heads = len(self.linear_layers(full)) * sizes.value_heads
        return [States(heads, sizes.key_width, sizes.value_width)]

    def state_bytes(self, config: Config) -> int:
        """All of them, in float32."""
        return sum(states.float32_bytes for states in self.states(config))


def mixer_spaces(layers: Iterable[int], sizes: MixerSizes) -> list[Space]:
    """Key channels, value channels, heads and grouped value heads of every one of `layers`."""
    heads, d_k, d_v = sizes.heads, sizes.key_width, sizes.value_width
    found = []
    for layer in layers:
        axes_of = {
            "key": _key_axes(layer, sizes),
            "value": _value_axes(layer, sizes),
            "head": _head_axes(layer, sizes),
        }
        found += [
            _space(layer, "key", heads, d_k, axes_of["key"]),
            _space(layer, "value", 1, d_v, axes_of["value"]),
            _space(layer, "head", 1, heads, axes_of["head"]),
        ]
        if sizes.group > 1:
            axes = _value_head_axes(layer, sizes)
            found.append(_space(layer, "value-head", heads, sizes.group, axes))
    return found


def _space(layer: int, kind: Kind, heads: int, width: int, axes: Iterable[Axis]) -> Space:
    return Space(f"layers.{layer}.{kind}", kind, layer, heads, width, tuple(axes))


def _key_axes(layer: int, sizes: MixerSizes) -> list[Axis]:
    return _rows(layer, "qk", HeadMajor(sizes.heads, sizes.key_width), sizes)


def _value_axes(layer: int, sizes: MixerSizes) -> list[Axis]:
    layout = SharedHeads(sizes.value_heads, sizes.value_width)
    norm = _axis(layer, "o_norm.weight", 0, SharedHeads(1, sizes.value_width), "norm")
    return [*_value_tensors(layer, layout, sizes), norm]


def _head_axes(layer: int, sizes: MixerSizes) -> list[Axis]:
    heads, group = sizes.heads, sizes.group
    values = Blocks(heads, group * sizes.value_width)
    return [
        *_rows(layer, "qk", Blocks(heads, sizes.key_width), sizes),
        *_value_tensors(layer, values, sizes),
        *(_axis(layer, name, 0, Blocks(heads, group), r) for name, r in sizes.per_value_head),
    ]


def _value_head_axes(layer: int, sizes: MixerSizes) -> list[Axis]:
    values = GroupedBlocks(sizes.heads, sizes.group, sizes.value_width)
    one = GroupedBlocks(sizes.heads, sizes.group, 1)
    return [
        *_value_tensors(layer, values, sizes),
        *(_axis(layer, name, 0, one, role) for name, role in sizes.per_value_head),
    ]


def _value_tensors(layer: int, layout: Layout, sizes: MixerSizes) -> list[Axis]:
    """Everything that has a position for each channel of each value head."""
    gate = [_axis(layer, "g_proj.weight", 0, layout)] if sizes.gate else []
    out = _axis(layer, "o_proj.weight", 1, layout)
    return [*_rows(layer, "v", layout, sizes), *gate, out]


def _rows(layer: int, names: str, layout: Layout, sizes: MixerSizes) -> list[Axis]:
    """Projections, then convolutions, of q, k or v."""
    axes = [_axis(layer, f"{name}_proj.weight", 0, layout) for name in names]
    if sizes.short_conv:
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
    """The layers that have a recurrent state; UserError if `attn` is not what fla reads."""
    specifications = config.get("attn") or []
    if isinstance(specifications, dict):
        specifications = [specifications]
    for specification in specifications:
        if not isinstance(specification, dict) or not isinstance(specification.get("layers"), list):
            raise UserError(f"config: attn is {specification!r}, expected a dict with its layers")
    return recurrent_layers(config)


def check_layers(config: Config) -> None:
    """Raise UserError if there is nothing to prune, or the norms' eps is no number.

    fla's models make convolutions without a bias whatever the config's `conv_bias` is; that the
    checkpoint has none is looked at when it is sliced.
    """
    positive_integer(config, "num_hidden_layers")
    check_eps(config, "norm_eps")
    if not linear_layers(config):
        raise UserError("config: attn names every layer, so there is no linear-attention layer")


def check_eps(config: Config, key: str) -> None:
    """Raise UserError unless `config[key]` is a finite number of at least 0."""
    eps = config[key]
    if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 <= eps < math.inf:
        raise UserError(f"config: {key} is {eps!r}, expected a number of 0 or more")
