"""Transformers' own hybrids: Gated DeltaNet between softmax layers.

`qwen3_5_text`, `qwen3_5_moe_text`, `qwen4_exp_text`, `qwen3_next` and `olmo_hybrid` have the same
keys, and call the operator under the name of transformers' fallback, behind which fla's is.
Key heads take along the value heads that they serve; value heads of a group leave the key heads.
"""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from flame.errors import UserError
from pruning.adapters.fused_projections import (
    ba_by_head,
    key_channels,
    qkv_flat,
    qkvz_by_head,
    value_channels,
    value_heads,
)
from pruning.adapters.interface import Config, Site
from pruning.adapters.projections import (
    MixerSizes,
    ProjectionFamily,
    check_eps,
    positive_integer,
    with_defaults,
)
from pruning.layouts import SharedHeads
from pruning.spaces import HEAD_KINDS, Axis, Kind, Space

LINEAR, SOFTMAX = "linear_attention", ("full_attention", "indexed_attention")
"""Entries of `layer_types`."""

INTERVAL = 4
"""Without `layer_types` and `full_attention_interval`, every fourth layer is softmax attention."""

SIZES = (
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_key_head_dim",
    "linear_value_head_dim",
)


class Hybrid(ProjectionFamily):
    """Base of these families."""

    defaults: ClassVar[Mapping[str, Any]] = {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "rms_norm_eps": 1e-6,
    }
    module: str
    """The module of transformers that defines the mixer."""
    class_name: str
    eps_key = "rms_norm_eps"
    value_heads_key = "linear_num_value_heads"
    norm_sites: ClassVar[tuple[Site, ...]] = ()
    norm: ClassVar[str] = "norm.weight"
    out: ClassVar[str] = "out_proj.weight"

    @property
    def mixer_class(self) -> tuple[str, str]:
        return (self.module, self.class_name)

    @property
    def op_sites(self) -> tuple[Site, ...]:
        """The names under which the mixer calls the operator."""
        names = ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule")
        return tuple(Site(self.module, name) for name in names)

    @abstractmethod
    def inputs(self, kind: Kind, sizes: MixerSizes) -> Iterator[Axis]:
        """The axes of the input projections for a kind of space, named within the mixer."""

    def check(self, config: Config) -> None:
        """Raise UserError for sizes that do not go together, or without a linear layer."""
        full = with_defaults(config, self.defaults)
        positive_integer(full, "num_hidden_layers")
        key_heads, heads = (positive_integer(full, name) for name in SIZES[:2])
        for name in SIZES[2:]:
            positive_integer(full, name)
        check_eps(full, self.eps_key)
        if heads % key_heads:
            raise UserError(
                f"config: linear_num_value_heads {heads} is not a multiple of "
                f"linear_num_key_heads {key_heads}"
            )
        if not self.linear_layers(full):
            raise UserError(f"config: layer_types names no {LINEAR}, so there is nothing to prune")

    def linear_layers(self, full: Config) -> list[int]:
        """The layers that `layer_types` calls linear; UserError if it is not what is read here."""
        depth, types = full["num_hidden_layers"], full.get("layer_types")
        if types is None:
            return [layer for layer in range(depth) if not self.is_softmax(layer, full)]
        if not isinstance(types, list) or len(types) != depth or set(types) - {LINEAR, *SOFTMAX}:
            known = ", ".join((LINEAR, *SOFTMAX))
            raise UserError(f"config: layer_types is {types!r}, expected {depth} of {known}")
        return [layer for layer, name in enumerate(types) if name == LINEAR]

    def is_softmax(self, layer: int, full: Config) -> bool:
        """Whether a layer is softmax attention in a config without `layer_types`."""
        return (layer + 1) % (full.get("full_attention_interval") or INTERVAL) == 0

    def sizes(self, full: Config) -> MixerSizes:
        """The sizes that the config leads to."""
        key_heads, heads, d_k, d_v = (full[name] for name in SIZES)
        return MixerSizes(key_heads, heads, d_k, d_v, short_conv=True, gate=True, per_value_head=())

    def knobs(self, full: Config, sizes: Mapping[Kind, int]) -> Config:
        """The sizes under the config's names, as far as they change."""
        before = self.sizes(full)
        heads = sizes.get("head", before.heads)
        group = sizes.get("value-head", before.group)
        d_k, d_v = sizes.get("key", before.key_width), sizes.get("value", before.value_width)
        after = zip(SIZES, (heads, heads * group, d_k, d_v), strict=True)
        return {name: value for name, value in after if value != full[name]}

    def spaces(self, config: Config) -> list[Space]:
        """Key channels, value channels, heads and grouped value heads of every linear layer."""
        full = with_defaults(config, self.defaults)
        sizes = self.sizes(full)
        grids: dict[Kind, tuple[int, int]] = {
            "key": (sizes.heads, sizes.key_width),
            "value": (1, sizes.value_width),
            "head": (1, sizes.heads),
        }
        grids |= {"value-head": (sizes.heads, sizes.group)} if sizes.group > 1 else {}
        return [
            Space(f"layers.{layer}.{kind}", kind, layer, *grid, self._axes(layer, kind, sizes))
            for layer in self.linear_layers(full)
            for kind, grid in grids.items()
        ]

    def _axes(self, layer: int, kind: Kind, sizes: MixerSizes) -> tuple[Axis, ...]:
        convolution = Axis("conv1d.weight", 0, qkv_flat(kind, sizes), "convolution")
        axes = [*self.inputs(kind, sizes), convolution, *self._outputs(kind, sizes)]
        prefix = f"model.layers.{layer}.linear_attn"
        return tuple(replace(axis, fqn=f"{prefix}.{axis.fqn}") for axis in axes)

    def _outputs(self, kind: Kind, sizes: MixerSizes) -> Iterator[Axis]:
        if kind != "key":
            yield Axis(self.out, 1, value_channels(kind, sizes))
        if kind == "value":
            yield Axis(self.norm, 0, SharedHeads(1, sizes.value_width), "norm")
        if kind in HEAD_KINDS:
            yield Axis("A_log", 0, value_heads(kind, sizes), "vector")
            yield Axis("dt_bias", 0, value_heads(kind, sizes), "vector")


@dataclass(frozen=True)
class Qwen3_5(Hybrid):
    """The text models of Qwen3.5 to Qwen3.8."""

    model_type: str = "qwen3_5_text"
    module: str = "transformers.models.qwen3_5.modeling_qwen3_5"
    class_name: str = "Qwen3_5GatedDeltaNet"

    def inputs(self, kind: Kind, sizes: MixerSizes) -> Iterator[Axis]:
        """Rows of the fused projection of q, k and v, and of those of z, b and a."""
        yield Axis("in_proj_qkv.weight", 0, qkv_flat(kind, sizes))
        if kind != "key":
            yield Axis("in_proj_z.weight", 0, value_channels(kind, sizes))
        if kind in HEAD_KINDS:
            yield Axis("in_proj_b.weight", 0, value_heads(kind, sizes))
            yield Axis("in_proj_a.weight", 0, value_heads(kind, sizes))


@dataclass(frozen=True)
class Qwen3_5Moe(Qwen3_5):
    """Those with experts, which are no part of what is pruned."""

    defaults = {**Hybrid.defaults, "hidden_size": 2048, "num_hidden_layers": 40}
    model_type: str = "qwen3_5_moe_text"
    module: str = "transformers.models.qwen3_5_moe.modeling_qwen3_5_moe"
    class_name: str = "Qwen3_5MoeGatedDeltaNet"


@dataclass(frozen=True)
class Qwen4(Qwen3_5Moe):
    """Qwen4-Exp: the same mixer among n-grams, hyper-connections and indexed attention."""

    model_type: str = "qwen4_exp_text"
    module: str = "transformers.models.qwen4_exp.modeling_qwen4_exp"
    class_name: str = "Qwen4ExpTextGatedDeltaNet"


@dataclass(frozen=True)
class Qwen3Next(Hybrid):
    """Qwen3-Next, whose input projections interleave by key head."""

    defaults = {**Hybrid.defaults, "hidden_size": 2048, "num_hidden_layers": 48}
    model_type: str = "qwen3_next"
    module: str = "transformers.models.qwen3_next.modeling_qwen3_next"
    class_name: str = "Qwen3NextGatedDeltaNet"

    def inputs(self, kind: Kind, sizes: MixerSizes) -> Iterator[Axis]:
        """Rows of the projection of q, k, v and z, and of that of b and a."""
        yield Axis("in_proj_qkvz.weight", 0, qkvz_by_head(kind, sizes))
        if kind in HEAD_KINDS:
            yield Axis("in_proj_ba.weight", 0, ba_by_head(kind, sizes))


@dataclass(frozen=True)
class OlmoHybrid(Hybrid):
    """Olmo-Hybrid, with projections of q, k, v and the gate of their own."""

    defaults = {
        **Hybrid.defaults,
        "hidden_size": 3840,
        "linear_num_key_heads": 30,
        "linear_num_value_heads": 30,
        "linear_key_head_dim": 96,
        "linear_value_head_dim": 192,
    }
    can_undo_gain: ClassVar[bool] = False
    """The eps of its output norm stands in its code."""
    norm: ClassVar[str] = "o_norm.weight"
    out: ClassVar[str] = "o_proj.weight"
    model_type: str = "olmo_hybrid"
    module: str = "transformers.models.olmo_hybrid.modeling_olmo_hybrid"
    class_name: str = "OlmoHybridGatedDeltaNet"

    def is_softmax(self, layer: int, full: Config) -> bool:
        """Every fourth layer, and the last one of a model with fewer."""
        depth = full["num_hidden_layers"]
        return layer % INTERVAL == INTERVAL - 1 or (depth < INTERVAL and layer == depth - 1)

    def inputs(self, kind: Kind, sizes: MixerSizes) -> Iterator[Axis]:
        """Rows of the projections of q, k, v, the gate, b and a."""
        if kind in ("key", "head"):
            yield Axis("q_proj.weight", 0, key_channels(kind, sizes))
            yield Axis("k_proj.weight", 0, key_channels(kind, sizes))
        if kind != "key":
            yield Axis("v_proj.weight", 0, value_channels(kind, sizes))
            yield Axis("g_proj.weight", 0, value_channels(kind, sizes))
        if kind in HEAD_KINDS:
            yield Axis("b_proj.weight", 0, value_heads(kind, sizes))
            yield Axis("a_proj.weight", 0, value_heads(kind, sizes))


HYBRIDS: tuple[Hybrid, ...] = (Qwen3_5(), Qwen3_5Moe(), Qwen4(), Qwen3Next(), OlmoHybrid())
