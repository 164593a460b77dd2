"""`slim_gated_deltanet`: fla's Gated DeltaNet with widths that differ between layers and heads."""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from fla.layers import gated_deltanet as fla_layer
from fla.models.gated_deltanet.configuration_gated_deltanet import GatedDeltaNetConfig
from fla.models.gated_deltanet.modeling_gated_deltanet import GatedDeltaNetBlock
from fla.modules import FusedRMSNormGated
from torch import Tensor, nn

from flame.models.decoder import CausalLM, Decoder, MixerBlock
from flame.models.mixer import RECURRENT_TOKENS, DeltaRuleMixer
from flame.models.widths import LayerWidths, layer_widths


class SlimGatedDeltaNetConfig(GatedDeltaNetConfig):
    """The dense model's `GatedDeltaNetConfig` with `widths` and `undo_gain` (see
    `flame.models.widths`).

    fla's CUDA kernels take key widths from 16 to 256; a layer with another one raises ValueError
    when it runs on CUDA.
    """

    model_type = "slim_gated_deltanet"

    def __init__(
        self, widths: dict[str, Any] | None = None, undo_gain: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.widths, self.undo_gain = widths, undo_gain
        self.layer_widths()

    def layer_widths(self) -> dict[int, LayerWidths]:
        """The widths of each recurrent layer, by number; ValueError if `widths` is malformed."""
        return layer_widths({**vars(self), "model_type": self.model_type})


class SlimGatedDeltaNetMixer(DeltaRuleMixer):
    """fla's `GatedDeltaNet` layer with a key width for each head.

    It calls the operators by the names in fla's module, so that whoever replaces one there (a tap,
    the CPU path) reaches this layer too.
    """

    def add_gates(self, config: Any) -> None:
        heads = self.widths.value_heads
        self.a_proj = nn.Linear(self.hidden_size, heads, bias=False)
        self.b_proj = nn.Linear(self.hidden_size, heads, bias=False)
        self.A_log = nn.Parameter(torch.empty(heads, dtype=torch.float32))
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.reset_parameters()
        for parameter in (self.A_log, self.dt_bias):
            parameter._no_weight_decay = True

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the decay as Mamba-2 does; what a checkpoint has filled, or is on meta, stays.

        exp(A_log) is uniform in (0, 16), softplus(dt_bias) log-uniform in 1e-3..0.1.
        """
        if self.A_log.is_meta:
            return
        if not getattr(self.A_log, "_is_hf_initialized", False):
            self.A_log.copy_(torch.empty_like(self.A_log).uniform_(0, 16).log())
        if not getattr(self.dt_bias, "_is_hf_initialized", False):
            low, high = math.log(1e-3), math.log(0.1)
            dt = torch.empty_like(self.dt_bias).uniform_(low, high).exp().clamp(min=1e-4)
            # The inverse of softplus, accurate for small dt.
            self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))

    def convolution_activation(self, name: str) -> str | None:
        return "silu"

    def activate(self, name: str, x: Tensor) -> Tensor:
        return x if self.use_short_conv else F.silu(x)

    def gated_norm(self, config: Any) -> nn.Module:
        return FusedRMSNormGated(
            self.widths.value,
            eps=self.output_eps(config),
            activation=config.output_gate_activation,
        )

    def gates(self, x: Tensor) -> Mapping[str, Tensor]:
        return {
            "g": self.a_proj(x),
            "beta": self.b_proj(x),
            "A_log": self.A_log,
            "dt_bias": self.dt_bias,
        }

    def operate(
        self, recurrent: bool, q: Tensor, k: Tensor, v: Tensor, **arguments: Any
    ) -> tuple[Tensor, Tensor | None]:
        chunk, steps = fla_layer.chunk_gated_delta_rule, fla_layer.fused_recurrent_gated_delta_rule
        return (steps if recurrent else chunk)(
            q=q,
            k=k,
            v=v,
            use_qk_l2norm_in_kernel=True,
            use_gate_in_kernel=True,
            use_beta_sigmoid_in_kernel=True,
            allow_neg_eigval=self.allow_neg_eigval,
            state_v_first=True,
            **arguments,
        )

    def takes_steps(self, length: int) -> bool:
        if torch.is_grad_enabled() or self.training:
            return False
        return length <= RECURRENT_TOKENS or self.mode == "fused_recurrent"


class SlimGatedDeltaNetBlock(MixerBlock, GatedDeltaNetBlock):
    mixer_class = SlimGatedDeltaNetMixer


class SlimGatedDeltaNetModel(Decoder):
    config_class = SlimGatedDeltaNetConfig
    block_class = SlimGatedDeltaNetBlock
    _no_split_modules = ["SlimGatedDeltaNetBlock"]


class SlimGatedDeltaNetForCausalLM(CausalLM):
    config_class = SlimGatedDeltaNetConfig
    decoder_class = SlimGatedDeltaNetModel
    _no_split_modules = ["SlimGatedDeltaNetBlock"]


CLASSES = (SlimGatedDeltaNetConfig, SlimGatedDeltaNetModel, SlimGatedDeltaNetForCausalLM)
