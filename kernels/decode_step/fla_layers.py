"""The decode step of fla 0.6.0's DeltaNet, GatedDeltaNet and KDA layers.

fla keeps, for each layer, one window for each of the convolutions of q, k and v, N by D by W with
the newest input last, and a state in float32, which is V by K in GatedDeltaNet and KDA and K by V
in DeltaNet.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from fla.layers.delta_net import DeltaNet
from fla.layers.gated_deltanet import GatedDeltaNet
from fla.layers.kda import KimiDeltaAttention
from fla.layers.utils import get_layer_cache, update_layer_cache
from fla.modules import FusedRMSNormGated, RMSNorm, ShortConvolution
from torch import Tensor, nn

from kernels.decode_step.step import Convolution, Decay, DecodeStep, Output
from kernels.decode_step.triton_step import decode_step, refusal
from kernels.triton_support import runs_on

OPERATORS = {
    DeltaNet: "fused_recurrent_delta_rule",
    GatedDeltaNet: "fused_recurrent_gated_delta_rule",
    KimiDeltaAttention: "fused_recurrent_kda",
}
"""The operator that each layer's own step calls, a name in the layer's module."""

_SILU = ("silu", "swish")


def decoded(
    layer: nn.Module,
    hidden_states: Tensor,
    attention_mask: Tensor | None,
    past_key_values: Any,
    use_cache: bool | None,
    **kwargs: Any,
) -> Tensor | None:
    """Return what the layer's forward gives for one token a row, or None if that is not our step.

    Ours is a token with a cache behind it, outside of training and autograd, of a layer with short
    convolutions, SiLU and L2-normalised keys, of shapes that the kernel takes. The cache is updated
    in place. A row whose last mask is 0 gives 0 and keeps its memory; the mask is not read on the
    host.
    """
    if not runs_on(hidden_states):
        return None
    token = hidden_states.shape[1] == 1 and kwargs.get("cu_seqlens") is None
    if torch.is_grad_enabled() or layer.training or not (token and use_cache):
        return None
    memory = _memory(layer, get_layer_cache(layer, past_key_values))
    if memory is None or not _has_our_flags(layer):
        return None
    state, windows = memory
    v_first = not isinstance(layer, DeltaNet)
    if not runs_on(hidden_states, attention_mask, state, *windows):
        return None
    if refusal(len(hidden_states), layer.num_heads, state, windows, v_first) is not None:
        return None
    real = None if attention_mask is None else attention_mask[:, -1]
    x = hidden_states[:, 0]
    o = decode_step(layer_step(layer, x, state, windows, real))
    update_layer_cache(layer, past_key_values, recurrent_state=state, conv_state=windows, offset=1)
    return layer.o_proj(o)[:, None]


def _memory(layer: nn.Module, cached: Any) -> tuple[Tensor, tuple[Tensor, ...]] | None:
    state, windows = (cached or {}).get("recurrent_state"), (cached or {}).get("conv_state")
    if not (isinstance(state, Tensor) and isinstance(windows, Sequence)):
        return None
    whole = len(windows) == 3 and all(isinstance(window, Tensor) for window in windows)
    return (state, tuple(windows)) if whole else None


def _has_our_flags(layer: Any) -> bool:
    convolutions = (layer.q_conv1d, layer.k_conv1d, layer.v_conv1d)
    if not all(type(convolution) is ShortConvolution for convolution in convolutions):
        return False
    if type(layer.o_norm) is FusedRMSNormGated:
        norm = getattr(layer, "use_gate", True)
    else:
        norm = type(layer.o_norm) is RMSNorm and layer.o_norm.bias is None and not layer.use_gate
    activations = [convolution.activation for convolution in convolutions]
    plain = not isinstance(layer, DeltaNet) or (
        layer.qk_norm == "l2" and layer.qk_activation in ("silu", "identity")
    )
    return norm and plain and activations[0] == activations[1] and activations[2] in _SILU


def layer_step(
    layer: Any, x: Tensor, state: Tensor, windows: Sequence[Tensor], real: Tensor | None
) -> DecodeStep:
    """Return the step of a layer on x `[N, hidden]`: its projections, parameters and memory."""
    modules = (layer.q_conv1d, layer.k_conv1d, layer.v_conv1d)
    q, k, v = (
        Convolution(module.weight.squeeze(1), window, module.bias)
        for module, window in zip(modules, windows, strict=True)
    )
    return DecodeStep(
        q=layer.q_proj(x),
        k=layer.k_proj(x),
        v=layer.v_proj(x),
        convolutions=(q, k, v),
        state=state,
        output=_output(layer, x),
        heads=layer.num_heads,
        decay=_DECAYS[type(layer)](layer, x),
        beta=layer.b_proj(x) if getattr(layer, "use_beta", True) else None,
        beta_scale=2.0 if layer.allow_neg_eigval else 1.0,
        activate_qk=layer.q_conv1d.activation in _SILU,
        state_v_first=not isinstance(layer, DeltaNet),
        real=real,
    )


def _output(layer: Any, x: Tensor) -> Output:
    norm = layer.o_norm
    if type(norm) is RMSNorm:
        return Output(norm.eps, norm.weight)
    swish = norm.activation in _SILU
    return Output(norm.eps, norm.weight, layer.g_proj(x), "swish" if swish else "sigmoid")


def _gated_deltanet_decay(layer: Any, x: Tensor) -> Decay:
    return Decay(layer.a_proj(x), layer.A_log, layer.dt_bias)


def _kda_decay(layer: Any, x: Tensor) -> Decay:
    return Decay(layer.f_proj(x), layer.A_log, layer.dt_bias, layer.lower_bound)


_DECAYS: dict[type, Callable[[Any, Tensor], Decay | None]] = {
    DeltaNet: lambda layer, x: None,
    GatedDeltaNet: _gated_deltanet_decay,
    KimiDeltaAttention: _kda_decay,
}
