"""Our `delta_net2`: DeltaNet whose short convolutions share their kernels."""

from dataclasses import dataclass, replace

from pruning.adapters.delta_net import DEFAULTS, DeltaNet
from pruning.adapters.interface import Config, Site, Widths
from pruning.adapters.projections import with_defaults
from pruning.adapters.widths import only_sizes, widths_by_kind
from pruning.spaces import Axis, Blocks, Space

_STOCK = DeltaNet()


@dataclass(frozen=True)
class DeltaNet2:
    """As `delta_net`, but that a shared kernel has no row for a channel.

    So key and value channels leave the convolutions alone unless `conv_sharing` is "channel", and
    a head takes its kernels along where each head has its own.
    """

    model_type: str = "delta_net2"
    mixer_class: tuple[str, str] = ("flame.models.delta_net2", "DeltaNet2Mixer")
    op_sites: tuple[Site, ...] = _STOCK.op_sites
    norm_sites: tuple[Site, ...] = _STOCK.norm_sites

    def check(self, config: Config) -> None:
        """Raise UserError if zeroing a channel is not the same as removing it."""
        _STOCK.check(config)

    def spaces(self, config: Config) -> list[Space]:
        """The spaces of every layer that is not softmax attention."""
        rows = _sharing(config) == "channel"
        spaces = _STOCK.spaces({**config, "use_short_conv": rows})
        if _sharing(config) != "head":
            return spaces
        return [_with_kernels(s, config) if s.kind == "head" else s for s in spaces]

    def resize(self, config: Config, widths: Widths) -> Config:
        """A copy of the config with `num_heads`, `expand_k` and `expand_v` rewritten."""
        only_sizes(self.model_type, widths_by_kind(self.spaces(config), widths))
        return _STOCK.resize(config, widths)

    def state_bytes(self, config: Config) -> int:
        """num_heads states of d_k x d_v per linear layer, in float32."""
        return _STOCK.state_bytes(config)


def _sharing(config: Config) -> str:
    """What has a kernel of its own: a layer, a head, a channel; `nothing` without convolutions."""
    if not with_defaults(config, DEFAULTS)["use_short_conv"]:
        return "nothing"
    return str(config.get("conv_sharing", "layer"))


def _with_kernels(space: Space, config: Config) -> Space:
    names = "qk" if config.get("share_kv_conv") else "qkv"
    prefix = f"model.layers.{space.layer}.attn."
    kernels = [
        Axis(f"{prefix}{name}_conv1d.weight", 0, Blocks(space.head_dim, 1), "convolution")
        for name in names
    ]
    return replace(space, axes=(*space.axes, *kernels))
