"""Random decode steps, their copies in other dtypes, and what fla's kernels make of them."""

from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.decode_step import Convolution, Decay, DecodeStep, Output

RULES = ("delta", "gated", "kda", "kda bounded")


def random_step(
    rule: str = "gated",
    K: int = 24,
    V: int = 40,
    *,
    rows: int = 2,
    heads: int = 2,
    group: int = 1,
    taps: int = 4,
    decay: float = 1.0,
    bias: bool = False,
    gate: str | None = "swish",
    padding: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    state_dtype: torch.dtype = torch.float32,
    **options: Any,
) -> DecodeStep:
    """A step of a layer in the middle of a sequence; a state is V by K but for the delta rule.

    Args:
        decay: the mean log-decay is about minus this.
        padding: the last row is padding.
        options: fields of `DecodeStep`.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    def convolution(size: int) -> Convolution:
        window = normal(rows, size, taps)
        return Convolution(normal(size, taps) / 2, window, normal(size) if bias else None)

    value_heads, channels = heads * group, (K if "kda" in rule else 1)
    gates = None
    if rule != "delta":
        a_log = torch.rand(value_heads, generator=generator) + torch.tensor(decay).log()
        bound = -5.0 if rule == "kda bounded" else None
        size = value_heads * channels
        gates = Decay(normal(rows, size), a_log, torch.randn(size, generator=generator), bound)
    first = rule != "delta"
    state = normal(rows, value_heads, V, K) if first else normal(rows, value_heads, K, V)
    return DecodeStep(
        normal(rows, heads * K),
        normal(rows, heads * K),
        normal(rows, value_heads * V),
        (convolution(heads * K), convolution(heads * K), convolution(value_heads * V)),
        state.to(state_dtype),
        Output(
            1e-5,
            torch.randn(V, generator=generator),
            normal(rows, value_heads * V) if gate else None,
            gate or "swish",
        ),
        heads,
        gates,
        normal(rows, value_heads),
        state_v_first=first,
        real=torch.arange(rows) < rows - 1 if padding else None,
        **options,
    )


def cloned(value: Any, dtype: torch.dtype | None = None, device: str | None = None) -> Any:
    """A copy that shares no tensor, on `device`; floating tensors in `dtype`."""
    if isinstance(value, Tensor):
        wanted = dtype if value.is_floating_point() else None
        return value.to(device or value.device, wanted or value.dtype, copy=True)
    if is_dataclass(value):
        made = (cloned(getattr(value, f.name), dtype, device) for f in fields(value))
        return type(value)(*made)
    if isinstance(value, tuple):
        return tuple(cloned(each, dtype, device) for each in value)
    return value


def memory(step: DecodeStep) -> list[Tensor]:
    """What a step updates: the state, and the windows of its convolutions."""
    return [step.state, *(convolution.window for convolution in step.convolutions)]


def of_fla(step: DecodeStep) -> Tensor:
    """The step by fla's recurrent kernel, with the roundings to the input's dtype of its layers.

    fla's kernels for the convolutions and for the output norm are autotuned, which Triton's
    interpreter cannot do: their formulas are computed in float32 instead.
    """
    from fla.ops.delta_rule.fused_recurrent import fused_recurrent_delta_rule_fwd
    from fla.ops.gated_delta_rule.fused_recurrent import fused_recurrent_gated_delta_rule_fwd
    from fla.ops.kda.fused_recurrent import fused_recurrent_kda_fwd

    q, k, v = (
        _convolved(x, c).unflatten(1, (heads, -1))[:, None]
        for x, c, heads in zip(
            (step.q, step.k, step.v),
            step.convolutions,
            (step.heads, step.heads, step.value_heads),
            strict=True,
        )
    )
    beta, scale = step.beta[:, None], step.query_scale
    if step.decay is None:
        rate = beta.sigmoid() * step.beta_scale
        lengths = ((x.float().square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
        q, k = ((x / length).to(x.dtype) for x, length in zip((q, k), lengths, strict=True))
        o, _, state = fused_recurrent_delta_rule_fwd(q, k, v, rate, scale, step.state, True)
    else:
        kda = step.channel_decay
        options: dict[str, Any] = {"inplace_final_state": False, "use_gate_in_kernel": True}
        options["lower_bound"] = step.decay.lower_bound
        o, state = (fused_recurrent_kda_fwd if kda else fused_recurrent_gated_delta_rule_fwd)(
            q=q, k=k, v=v, beta=beta,
            g=step.decay.input.unflatten(1, (step.value_heads, -1))[:, None] if kda
            else step.decay.input[:, None],
            A_log=step.decay.a_log, dt_bias=step.decay.dt_bias, scale=scale,
            initial_state=step.state, output_final_state=True, state_v_first=True,
            use_qk_l2norm_in_kernel=True, use_beta_sigmoid_in_kernel=True,
            allow_neg_eigval=step.beta_scale == 2, **(options if kda else {}),
        )  # fmt: skip
    step.state.copy_(state)
    o = o[:, 0].float()
    o = o / (o.square().mean(-1, keepdim=True) + step.output.eps).sqrt() * step.output.weight
    o, gate = o.flatten(1), step.output.gate
    if gate is not None:
        o = o * (F.silu if step.output.activation == "swish" else torch.sigmoid)(gate.float())
    return _stored(o, step.q.dtype)


def _stored(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` as the interpreter stores it, which cuts a float32 off to a bfloat16; on CUDA rounded."""
    if dtype == torch.float32 or x.is_cuda:
        return x.to(dtype)
    return (x.view(torch.int32) & -(1 << 16)).view(torch.float32).to(dtype)


def _convolved(x: Tensor, convolution: Convolution) -> Tensor:
    taps = torch.cat([convolution.window[..., 1:], x[..., None]], -1)
    convolution.window.copy_(taps)
    y = (taps.float() * convolution.weight.float()).sum(-1)
    y = y if convolution.bias is None else y + convolution.bias.float()
    return _stored(F.silu(y), x.dtype)
