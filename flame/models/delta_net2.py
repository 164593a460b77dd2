"""`delta_net2`: DeltaNet whose short convolutions share their kernels.

fla's `delta_net` has one kernel for each channel of q, k and v; here the channels of a head or of
a layer share one. Such a convolution commutes with rotations of a head's channels. With
`qk_activation="identity"` and the L2 norm everything up to the state does, so a head's keys can be
projected on any subspace exactly (arXiv 2602.04852 studies such models).
"""

from collections.abc import Mapping
from typing import Any

from fla.models.delta_net.configuration_delta_net import DeltaNetConfig
from fla.models.delta_net.modeling_delta_net import DeltaNetBlock
from torch import Tensor

from flame.models.decoder import CausalLM, Decoder, MixerBlock
from flame.models.shared_convolution import SHARINGS, SharedConvolution, Sharing, TokenShift
from flame.models.slim_delta_net import SlimDeltaNetMixer
from flame.models.widths import LayerWidths, delta_net_shape, recurrent_layers


class DeltaNet2Config(DeltaNetConfig):
    """fla's `DeltaNetConfig` and three options of the short convolutions.

    Args:
        conv_sharing: which channels of q (and of k, and of v) share a kernel: those of the `layer`
            or of a `head`; with `channel` none do, as in fla's layer.
        share_kv_conv: v goes through the convolution of k.
        shift_only_conv: convolve by a learned mix with the token before (`TokenShift`), not by a
            learned kernel; `conv_size` is ignored then.
        options: those of `DeltaNetConfig`. `qk_activation` may be silu, relu, elu or identity; the
            activation of v is always silu.

    Raises:
        ValueError: an option is unknown, or two do not fit together.
    """

    model_type = "delta_net2"

    def __init__(
        self,
        conv_sharing: Sharing = "layer",
        share_kv_conv: bool = False,
        shift_only_conv: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.conv_sharing = conv_sharing
        self.share_kv_conv, self.shift_only_conv = share_kv_conv, shift_only_conv
        _check(self)

    def layer_widths(self) -> dict[int, LayerWidths]:
        """The widths of each recurrent layer, the same in all of them, by layer number."""
        shape = delta_net_shape(vars(self))
        widths = LayerWidths((shape.key,) * shape.heads, shape.value)
        return dict.fromkeys(recurrent_layers(vars(self)), widths)


def _check(config: DeltaNet2Config) -> None:
    if config.conv_sharing not in SHARINGS:
        raise ValueError(f"conv_sharing is {config.conv_sharing!r}: choose {', '.join(SHARINGS)}")
    if config.share_kv_conv and config.conv_sharing == "channel":
        raise ValueError(
            "share_kv_conv needs conv_sharing layer or head: k and v have different channels"
        )
    if not config.use_short_conv and (config.share_kv_conv or config.shift_only_conv):
        raise ValueError("share_kv_conv and shift_only_conv need use_short_conv true")


class DeltaNet2Mixer(SlimDeltaNetMixer):
    """fla's `DeltaNet` layer with convolutions that share their kernels."""

    def add_convolutions(self, config: DeltaNet2Config, rows: Mapping[str, int]) -> None:
        self.share_kv_conv = config.share_kv_conv
        for name in "qk" if self.share_kv_conv else "qkv":
            count = {"layer": 1, "head": self.widths.heads, "channel": rows[name]}
            kernels = count[config.conv_sharing]
            width = config.conv_size
            made = (
                TokenShift(kernels) if config.shift_only_conv else SharedConvolution(kernels, width)
            )
            setattr(self, f"{name}_conv1d", made)

    def convolve(
        self, name: str, x: Tensor, cache: Tensor | None, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        owner = "k" if name == "v" and self.share_kv_conv else name
        activation = self.convolution_activation(name)
        return getattr(self, f"{owner}_conv1d")(x, activation, cache, **options)


class DeltaNet2Block(MixerBlock, DeltaNetBlock):
    mixer_class = DeltaNet2Mixer


class DeltaNet2Model(Decoder):
    config_class = DeltaNet2Config
    block_class = DeltaNet2Block
    _no_split_modules = ["DeltaNet2Block"]


class DeltaNet2ForCausalLM(CausalLM):
    config_class = DeltaNet2Config
    decoder_class = DeltaNet2Model
    _no_split_modules = ["DeltaNet2Block"]


CLASSES = (DeltaNet2Config, DeltaNet2Model, DeltaNet2ForCausalLM)
