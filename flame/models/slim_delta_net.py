"""`slim_delta_net`: fla's DeltaNet with widths that differ between layers and heads."""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from fla.layers import delta_net as fla_layer
from fla.models.delta_net.configuration_delta_net import DeltaNetConfig
from fla.models.delta_net.modeling_delta_net import DeltaNetBlock
from fla.models.modeling_utils import FLAPreTrainedModel
from torch import Tensor, nn

from flame.models.decoder import CausalLM, Decoder
from flame.models.mixer import SHORT, Mixer
from flame.models.widths import LayerWidths, layer_widths


class SlimDeltaNetConfig(DeltaNetConfig):
    """The dense model's `DeltaNetConfig` and `widths` (see `flame.models.widths`).

    On CUDA fla's kernels need key widths from 16 to 256; a layer that has another says so when it
    runs there.
    """

    model_type = "slim_delta_net"

    def __init__(self, widths: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.widths = widths
        self.layer_widths()

    def layer_widths(self) -> dict[int, LayerWidths]:
        """The widths of each recurrent layer; ValueError where `widths` is none."""
        return layer_widths({**vars(self), "model_type": self.model_type})


class SlimDeltaNetMixer(Mixer):
    """fla's `DeltaNet` layer; the operators are looked up where that layer looks them up."""

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
        return length <= SHORT or self.mode == "fused_recurrent"


class SlimDeltaNetBlock(DeltaNetBlock):
    """fla's block; a recurrent layer's mixer is ours."""

    def __init__(self, config: SlimDeltaNetConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        widths = config.layer_widths().get(layer_idx)
        if widths is not None:
            self.attn = SlimDeltaNetMixer(config, layer_idx, widths)


class SlimDeltaNetPreTrainedModel(FLAPreTrainedModel):
    config_class = SlimDeltaNetConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SlimDeltaNetBlock"]
    _supports_cache_class = True


class SlimDeltaNetModel(SlimDeltaNetPreTrainedModel, Decoder):
    """The decoder without a head."""

    block_class = SlimDeltaNetBlock


class SlimDeltaNetForCausalLM(SlimDeltaNetPreTrainedModel, CausalLM):
    """The causal language model."""

    decoder_class = SlimDeltaNetModel


CLASSES = (SlimDeltaNetConfig, SlimDeltaNetModel, SlimDeltaNetForCausalLM)
