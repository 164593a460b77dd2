"""Transformers' hybrids of Kimi Delta Attention: `kimi_linear` and `glm5_next_text`.

One `linear_head_dim` d is the width of q, k and v and the inner width of two low-rank gates, the
decay's (f_a_proj, then f_b_proj) and the output's (g_a_proj, then g_b_proj). So key and value
channels go to one width together, and the gates are fitted anew to it (`pruning.repair.gates`).
Their inner widths belong to the value space, which has one selection a layer: only its size counts
there.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from flame.errors import UserError
from pruning.adapters.fused_projections import (
    key_channels,
    qkv_flat,
    value_channels,
    value_heads,
)
from pruning.adapters.interface import Config, Site, States, Widths
from pruning.adapters.projections import (
    MixerSizes,
    ProjectionFamily,
    check_eps,
    positive_integer,
    with_defaults,
)
from pruning.layouts import SharedHeads
from pruning.spaces import Axis, Kind, Space

LINEAR, SOFTMAX = "linear_attention", ("full_attention", "indexed_attention")
"""Entries of `layer_types`."""

NESTED = "linear_attn_config"
"""The key under which published checkpoints keep the sizes of linear layers; it goes before the
others."""

NESTED_KEYS = {"linear_head_dim": "head_dim", "linear_num_heads": "num_heads"}
"""What the sizes are called there."""


def _sites(module: str) -> tuple[Site, ...]:
    names = ("chunk_kimi_delta_attention", "recurrent_kimi_delta_attention")
    return tuple(Site(module, name) for name in names)


@dataclass(frozen=True)
class KimiLinear(ProjectionFamily):
    """Kimi-Linear: heads, and key and value channels to one width."""

    defaults: ClassVar[Mapping[str, Any]] = {
        "hidden_size": 2304,
        "num_hidden_layers": 27,
        "linear_num_heads": 32,
        "linear_head_dim": 128,
        "rms_norm_eps": 1e-5,
    }
    eps_key: ClassVar[str] = "rms_norm_eps"
    tied_width: ClassVar[str] = "linear_head_dim"
    model_type: str = "kimi_linear"
    mixer_class: tuple[str, str] = (
        "transformers.models.kimi_linear.modeling_kimi_linear",
        "KimiLinearDeltaAttention",
    )
    op_sites: tuple[Site, ...] = _sites(mixer_class[0])
    norm_sites: tuple[Site, ...] = ()
    decay_dim: ClassVar[int] = 2
    """The dimension of A_log that has an entry for each head."""

    def completed(self, config: Config) -> Config:
        """The config with every size under its own key, as the stock class reads it."""
        full = with_defaults(config, self.defaults)
        nested = config.get(NESTED) or {}
        if not isinstance(nested, dict):
            raise UserError(f"config: {NESTED} is {nested!r}, expected an object")
        return full | {key: nested[name] for key, name in NESTED_KEYS.items() if name in nested}

    def check(self, config: Config) -> None:
        """Raise UserError for sizes that are none, or without a linear layer."""
        full = self.completed(config)
        for key in ("num_hidden_layers", "linear_num_heads", "linear_head_dim"):
            positive_integer(full, key)
        check_eps(full, self.eps_key)
        if not self.linear_layers(full):
            raise UserError(f"config: layer_types names no {LINEAR}, so there is nothing to prune")

    def linear_layers(self, full: Config) -> list[int]:
        """The layers with a recurrent state, from `layer_types` or the nested lists, from 1."""
        depth, types = full["num_hidden_layers"], full.get("layer_types")
        nested = full.get(NESTED) or {}
        if types is None:
            return self.layers_without_types(depth, nested)
        if not isinstance(types, list) or len(types) != depth or set(types) - {LINEAR, *SOFTMAX}:
            known = ", ".join((LINEAR, *SOFTMAX))
            raise UserError(f"config: layer_types is {types!r}, expected {depth} of {known}")
        return [layer for layer, name in enumerate(types) if name == LINEAR]

    def layers_without_types(self, depth: int, nested: Config) -> list[int]:
        """Those of a config without `layer_types`, from its nested object."""
        if {"kda_layers", "full_attn_layers"} <= nested.keys():
            return sorted(layer - 1 for layer in nested["kda_layers"])
        return [layer for layer in range(depth) if layer == 0 or layer % 4]

    def sizes(self, full: Config) -> MixerSizes:
        """The sizes that the config leads to."""
        heads, width = full["linear_num_heads"], full["linear_head_dim"]
        return MixerSizes(heads, heads, width, width, True, True, per_value_head=())

    def knobs(self, full: Config, sizes: Mapping[Kind, int]) -> Config:
        """The sizes where the config has them; ValueError for key and value widths that differ."""
        before = self.sizes(full)
        d_k, d_v = sizes.get("key", before.key_width), sizes.get("value", before.value_width)
        if d_k != d_v:
            raise ValueError(
                f"{d_k} key and {d_v} value channels: linear_head_dim of a {self.model_type} "
                "config is both, so prune to a square (--space square)"
            )
        after = {"linear_head_dim": d_k, "linear_num_heads": sizes.get("head", before.heads)}
        changed: Config = {key: value for key, value in after.items() if value != full[key]}
        nested = full.get(NESTED) or {}
        inside = {NESTED_KEYS[k]: v for k, v in changed.items() if NESTED_KEYS[k] in nested}
        return changed | ({NESTED: nested | inside} if inside else {})

    def spaces(self, config: Config) -> list[Space]:
        """Key channels, value channels and heads of every linear layer."""
        full = self.completed(config)
        sizes = self.sizes(full)
        grids: dict[Kind, tuple[int, int]] = {
            "key": (sizes.heads, sizes.key_width),
            "value": (1, sizes.value_width),
            "head": (1, sizes.heads),
        }
        return [
            Space(f"layers.{layer}.{kind}", kind, layer, *grid, self._axes(layer, kind, sizes))
            for layer in self.linear_layers(full)
            for kind, grid in grids.items()
        ]

    def resize(self, config: Config, widths: Widths, undo_gain: bool = False) -> Config:
        """As `ProjectionFamily.resize`, from the sizes under their own keys or the nested ones."""
        full = self.completed(config)
        after = super().resize(full, widths, undo_gain)
        return {k: v for k, v in after.items() if k in config or v != full.get(k)}

    def states(self, config: Config) -> list[States]:
        """One state of d x d a head and linear layer."""
        return super().states(self.completed(config))

    def _axes(self, layer: int, kind: Kind, sizes: MixerSizes) -> tuple[Axis, ...]:
        axes: list[Axis] = []
        if kind != "value":
            channels = key_channels(kind, sizes)
            axes += [Axis(f"{name}_proj.weight", 0, channels) for name in "qk"]
            axes += [
                Axis("forget_gate.f_b_proj.weight", 0, channels, "gate"),
                Axis("forget_gate.dt_bias", 0, channels, "vector"),
            ]
        if kind != "key":
            channels = value_channels(kind, sizes)
            axes += [
                Axis("v_proj.weight", 0, channels),
                Axis("g_b_proj.weight", 0, channels, "gate"),
                Axis("o_proj.weight", 1, channels),
            ]
        axes.append(Axis("conv1d.weight", 0, qkv_flat(kind, sizes), "convolution"))
        one = SharedHeads(1, sizes.value_width)
        if kind == "value":
            axes += [
                Axis("o_norm.weight", 0, one, "norm"),
                Axis("forget_gate.f_a_proj.weight", 0, one, "inner"),
                Axis("forget_gate.f_b_proj.weight", 1, one, "inner"),
                Axis("g_a_proj.weight", 0, one, "inner"),
                Axis("g_b_proj.weight", 1, one, "inner"),
            ]
        if kind == "head":
            axes.append(Axis("b_proj.weight", 0, value_heads(kind, sizes)))
            axes.append(
                Axis("forget_gate.A_log", self.decay_dim, value_heads(kind, sizes), "vector")
            )
        prefix = f"model.layers.{layer}.self_attn"
        return tuple(replace(axis, fqn=f"{prefix}.{axis.fqn}") for axis in axes)


@dataclass(frozen=True)
class Glm5Next(KimiLinear):
    """The text model of GLM-5.3: the same mixer among hyper-connections and indexed attention."""

    defaults: ClassVar[Mapping[str, Any]] = {
        "hidden_size": 4096,
        "num_hidden_layers": 45,
        "linear_num_heads": 64,
        "linear_head_dim": 128,
        "rms_norm_eps": 1e-5,
    }
    model_type: str = "glm5_next_text"
    mixer_class: tuple[str, str] = (
        "transformers.models.glm5_next.modeling_glm5_next",
        "Glm5NextTextLinearAttention",
    )
    op_sites: tuple[Site, ...] = _sites(mixer_class[0])
    decay_dim: ClassVar[int] = 0

    def layers_without_types(self, depth: int, nested: Config) -> list[int]:
        """All but every fourth; the nested object's lists of layers are not read there."""
        return [layer for layer in range(depth) if layer % 4 != 3]


KDA_HYBRIDS: tuple[KimiLinear, ...] = (KimiLinear(), Glm5Next())
