"""`delta_net2`: DeltaNet whose short convolutions share their kernels.

fla's `delta_net` has a kernel of its own for each channel of q, k and v. Here the channels of a
head, or of a layer, share one. Then the convolution commutes with rotations of a head's channels,
and with `qk_activation="identity"` and the L2 norm so does everything up to the state: the keys of
a head can be projected on any subspace exactly (arXiv 2602.04852 studies such models).
"""

from collections.abc import Mapping
from typing import Any

from fla.models.delta_net.configuration_delta_net import DeltaNetConfig
from fla.models.delta_net.modeling_delta_net import DeltaNetBlock
from fla.models.modeling_utils import FLAPreTrainedModel
from torch import Tensor

from flame.models.decoder import CausalLM, Decoder
from flame.models.shared_convolution import SHARINGS, SharedConvolution, Sharing, TokenShift
from flame.models.slim_delta_net import SlimDeltaNetMixer
from flame.models.widths import LayerWidths, delta_net_shape, recurrent_layers


class DeltaNet2Config(DeltaNetConfig):
    """fla's `DeltaNetConfig` and three options of the short convolutions.

    Args:
        conv_sharing: what has one kernel for q, one for k, one for v: a `layer`, each `head`, or
            each `channel`, as in fla's layer.
        share_kv_conv: v goes through the convolution of k.
        shift_only_conv: no learned kernel but a mix with the token before, of one learned weight
            (`flame.models.shared_convolution.TokenShift`); `conv_size` has no meaning then.
        options: of `DeltaNetConfig`; `qk_activation` may be silu, relu, elu or identity; v has
            silu always.

    Raises:
        ValueError: for values that do not fit together.
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
    """fla's `DeltaNet` layer but for its convolutions."""

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


class DeltaNet2Block(DeltaNetBlock):
    """fla's block; a recurrent layer's mixer is ours."""

    def __init__(self, config: DeltaNet2Config, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        if layer_idx in recurrent_layers(vars(config)):
            shape = delta_net_shape(vars(config))
            widths = LayerWidths((shape.key,) * shape.heads, shape.value)
            self.attn = DeltaNet2Mixer(config, layer_idx, widths)


class DeltaNet2PreTrainedModel(FLAPreTrainedModel):
    config_class = DeltaNet2Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DeltaNet2Block"]
    _supports_cache_class = True


class DeltaNet2Model(DeltaNet2PreTrainedModel, Decoder):
    """The decoder without a head."""

    block_class = DeltaNet2Block


class DeltaNet2ForCausalLM(DeltaNet2PreTrainedModel, CausalLM):
    """The causal language model."""

    decoder_class = DeltaNet2Model


CLASSES = (DeltaNet2Config, DeltaNet2Model, DeltaNet2ForCausalLM)
