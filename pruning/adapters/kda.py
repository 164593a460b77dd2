"""fla's `kda`: Kimi Delta Attention, with a decay for each key channel of each value head."""

from dataclasses import dataclass, replace

from pruning.adapters.head_dim import HeadDimFamily
from pruning.adapters.interface import Config, Site
from pruning.adapters.projections import MixerSizes, with_defaults
from pruning.layouts import Blocks, GroupedBlocks, Layout, Strided
from pruning.spaces import Axis, Role, Space

DEFAULTS = {
    "hidden_size": 2048,
    "head_dim": 128,
    "expand_v": 1.0,
    "num_heads": 16,
    "num_v_heads": None,
    "num_hidden_layers": 24,
    "use_short_conv": True,
    "attn": None,
    "norm_eps": 1e-6,
}

PER_VALUE_HEAD: tuple[tuple[str, Role], ...] = (
    ("b_proj.weight", "projection"),
    ("A_log", "vector"),
)


@dataclass(frozen=True)
class Kda(HeadDimFamily):
    """Key channels carry their decays: rows of the decay's last projection, and its bias.

    There is no space of value channels: the config's value width is the rank of the decay's and of
    the output gate's projections too, and a smaller rank is not what removing channels is. With
    num_v_heads above num_heads, each key head serves a group of value heads.
    """

    defaults = DEFAULTS
    value_heads_key = "num_v_heads"
    model_type: str = "kda"
    mixer_class: tuple[str, str] = ("fla.layers.kda", "KimiDeltaAttention")
    op_sites: tuple[Site, ...] = (
        Site("fla.layers.kda", "chunk_kda"),
        Site("fla.layers.kda", "fused_recurrent_kda"),
    )
    norm_sites: tuple[Site, ...] = ()

    def per_value_head(self, full: Config) -> tuple[tuple[str, Role], ...]:
        """The projection of β, and the decay's rate."""
        return PER_VALUE_HEAD

    def spaces(self, config: Config) -> list[Space]:
        """Key channels, heads and grouped value heads of every layer that has a state."""
        sizes = self.sizes(with_defaults(config, DEFAULTS))
        return [
            replace(space, axes=(*space.axes, *_gate_axes(space, sizes)))
            for space in super().spaces(config)
            if space.kind != "value"
        ]


def _gate_axes(space: Space, sizes: MixerSizes) -> list[Axis]:
    """The axes of the gates' last projections in a space of one layer.

    All kinds of space index the decay's (`f_proj.1.weight` and its bias, `dt_bias`). Those of heads
    also index the output gate's (`g_proj.1`, weight and bias).
    """
    group = sizes.group
    prefix = f"model.layers.{space.layer}.attn"
    width = sizes.key_width
    if space.kind == "key":
        # A row for each value head: what it has for every key channel of its key head.
        counts, strides = (sizes.heads, width, group), (group * width, 1, width)
        decay: Layout = Strided(sizes.heads * group * width, counts, strides)
        out: Layout | None = None
    elif space.kind == "value-head":
        decay = GroupedBlocks(sizes.heads, group, width)
        out = GroupedBlocks(sizes.heads, group, sizes.value_width)
    else:
        decay = Blocks(sizes.heads, group * width)
        out = Blocks(sizes.heads, group * sizes.value_width)
    axes = [
        Axis(f"{prefix}.f_proj.1.weight", 0, decay, "gate"),
        Axis(f"{prefix}.dt_bias", 0, decay, "vector"),
    ]
    if out is not None:
        axes.append(Axis(f"{prefix}.g_proj.1.weight", 0, out, "gate"))
        axes.append(Axis(f"{prefix}.g_proj.1.bias", 0, out, "vector"))
    return axes
