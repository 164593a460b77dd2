"""Our `delta_net2`: DeltaNet whose short convolutions share their kernels."""

from dataclasses import dataclass, replace

from pruning.adapters.delta_net import DEFAULTS, DeltaNet
from pruning.adapters.interface import Config
from pruning.adapters.projections import with_defaults
from pruning.layouts import Blocks
from pruning.spaces import Axis, Space


@dataclass(frozen=True)
class DeltaNet2(DeltaNet):
    """As `delta_net`, but that a shared kernel has no row for a channel.

    So key and value channels leave the convolutions alone unless `conv_sharing` is "channel", and
    a head takes its kernels along where each head has its own.
    """

    has_slim_class = False
    model_type: str = "delta_net2"
    mixer_class: tuple[str, str] = ("flame.models.delta_net2", "DeltaNet2Mixer")

    def spaces(self, config: Config) -> list[Space]:
        """The spaces of every layer that is not softmax attention."""
        sharing = _sharing(config)
        spaces = super().spaces({**config, "use_short_conv": sharing == "channel"})
        if sharing != "head":
            return spaces
        return [_with_kernels(s, config) if s.kind == "head" else s for s in spaces]


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
