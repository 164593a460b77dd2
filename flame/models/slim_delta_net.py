"""`slim_delta_net`: fla's DeltaNet with widths that differ between layers and heads."""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from fla.layers import delta_net as fla_layer
from fla.models.delta_net.configuration_delta_net import DeltaNetConfig
from fla.models.delta_net.modeling_delta_net import DeltaNetBlock
from torch import Tensor, nn

from flame.models.decoder import CausalLM, Decoder, MixerBlock
from flame.models.mixer import RECURRENT_TOKENS, DeltaRuleMixer
from flame.models.widths import LayerWidths, layer_widths


class SlimDeltaNetConfig(DeltaNetConfig):
    """The dense model's `DeltaNetConfig` with `widths` and `undo_gain` (see
    `flame.models.widths`).

    fla's CUDA kernels take key widths from 16 to 256; a layer with another one raises ValueError
    when it runs on CUDA.
    """

    model_type = "slim_delta_net"

    def __init__(
        self, widths: dict[str, Any] | None = None, undo_gain: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.widths, self.undo_gain = widths, undo_gain
        self.layer_widths()

    def layer_widths(self) -> dict[int, LayerWidths]:
        """The widths of each recurrent layer, by number; ValueError if `widths` is malformed."""
        return layer_widths({**vars(self), "model_type": self.model_type})


class SlimDeltaNetMixer(DeltaRuleMixer):
    """fla's `DeltaNet` layer with a key width for each head.

    It is made from the model's config, the layer's number and its `LayerWidths`; `forward` is that
    of `DeltaRuleMixer`. It calls the operators by the names in fla's module, so that
    whoever replaces one there (a tap, the CPU path) reaches this layer too.
    """

    def add_gates(self, config: Any) -> None:
        self.qk_activation, self.qk_norm = config.qk_activation, config.qk_norm
        self.use_beta = config.use_beta
        if self.use_beta:
            self.b_proj = nn.Linear(self.hidden_size, self.widths.value_heads, bias=False)

    def convolution_activation(self, name: str) -> str | None:
        return "silu" if name == "v" or self.qk_activation == "silu" else None

    def activate(self, name: str, x: Tensor) -> Tensor:
        activation = "silu" if name == "v" else self.qk_activation
        if activation == "silu":
            return x if self.use_short_conv else F.silu(x)
        if activation == "elu":
            return fla_layer.elu_p1(x)
        return x.relu() if activation == "relu" else x

    def gates(self, x: Tensor) -> Mapping[str, Tensor]:
        if not self.use_beta:
            beta = x.new_ones(*x.shape[:-1], self.widths.value_heads)
        else:
            beta = self.b_proj(x).sigmoid()
        return {"beta": beta * 2.0 if self.allow_neg_eigval else beta}

    def operate(
        self, recurrent: bool, q: Tensor, k: Tensor, v: Tensor, **arguments: Any
    ) -> tuple[Tensor, Tensor | None]:
        if self.qk_norm == "sum":
            q, k = fla_layer.sum_norm(q), fla_layer.sum_norm(k)
        rule = fla_layer.fused_recurrent_delta_rule if recurrent else fla_layer.chunk_delta_rule
        return rule(q=q, k=k, v=v, use_qk_l2norm_in_kernel=self.qk_norm == "l2", **arguments)

    def takes_steps(self, length: int) -> bool:
        return length <= RECURRENT_TOKENS or self.mode == "fused_recurrent"


class SlimDeltaNetBlock(MixerBlock, DeltaNetBlock):
    mixer_class = SlimDeltaNetMixer


class SlimDeltaNetModel(Decoder):
    config_class = SlimDeltaNetConfig
    block_class = SlimDeltaNetBlock
    _no_split_modules = ["SlimDeltaNetBlock"]


class SlimDeltaNetForCausalLM(CausalLM):
    config_class = SlimDeltaNetConfig
    decoder_class = SlimDeltaNetModel
    _no_split_modules = ["SlimDeltaNetBlock"]


CLASSES = (SlimDeltaNetConfig, SlimDeltaNetModel, SlimDeltaNetForCausalLM)
