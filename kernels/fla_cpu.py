"""Putting the CPU operators under fla 0.6.0: the one place that changes fla.

There are four kinds of entry point:

- Functions that fla dispatches: our operators are registered in `fla.backends` with a verifier that
  accepts CPU tensors only, so an accelerator's tensors still take fla's own kernels.
- The delta rule, the delta product and the recurrent operators, which fla 0.6.0 does not dispatch:
  they are wrapped in fla's dispatcher, and every fla module that holds one gets the wrapped one.
- `FusedCrossEntropyLoss.forward`, which asserts an accelerator before it dispatches anything: for
  CPU tensors the same computation runs without the assertion.
- The softmax layers of hybrids (`fla.layers.attn`), which refuse to be built without flash-attn:
  without it, on every device, ours stands in its place; with it, ours takes CPU tensors alone.
"""

import sys
from collections.abc import Callable
from functools import cache, wraps
from typing import Any

from fla.backends import BaseBackend, dispatch, register
from torch import Tensor

from kernels import (
    activations,
    cross_entropy,
    delta_rule,
    gated_delta_product,
    gated_delta_rule,
    kda,
    norms,
    rotary,
    short_conv,
    softmax_attention,
)


class CpuBackend(BaseBackend):
    """The backend of our operators, which fla asks before every other one."""

    backend_type = "slimstate_cpu"
    priority = -1


class GatedDeltaRuleCpuBackend(CpuBackend):
    """Ours for `gated_delta_rule` in `fla.backends`: the chunk operator alone.

    fla takes its own of the other functions that it dispatches under this name, which are steps of
    its chunk operator. The recurrent operator is not among them: see `_undispatched`.
    """

    chunk_gated_delta_rule = staticmethod(gated_delta_rule.chunk_gated_delta_rule)


class KdaCpuBackend(CpuBackend):
    """Has only the gate; for the other functions of this registry fla takes its own."""

    fused_kda_gate = staticmethod(kda.fused_kda_gate)


@cache
def install() -> None:
    """Make fla's models run on CPU tensors; calling it again does nothing."""
    register("gated_delta_rule", verifier=_accepts_cpu)(GatedDeltaRuleCpuBackend)
    register("kda", verifier=_accepts_cpu)(KdaCpuBackend)
    for entry, implementation in _dispatched():
        register(entry, backend=CpuBackend, verifier=_accepts_cpu)(implementation)
    for entry, implementation in _undispatched():
        replace(entry, _dispatching(entry, implementation))
    _allow_cpu_loss()
    _allow_softmax_layers()


def _accepts_cpu(*args: Any, **kwargs: Any) -> tuple[bool, str | None]:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value.device.type == "cpu", f"the input is on {value.device}"
    return False, "no tensor among the arguments"


def _dispatched() -> list[tuple[Any, Callable[..., Any]]]:
    """Return pairs of a function that fla dispatches and our operator for it."""
    from fla.modules.activations import ops as fla_activations
    from fla.modules.causal_conv1d import ops as fla_conv
    from fla.modules.fused_cross_entropy import ops as fla_loss
    from fla.modules.fused_linear_cross_entropy import ops as fla_linear_loss
    from fla.modules.norm import fused_norm_gate, l2norm, layernorm
    from fla.modules.rotary import ops as fla_rotary
    from fla.ops.kda import chunk_kda

    found: list[tuple[Any, Callable[..., Any]]] = [
        (fla_conv.causal_conv1d_update_states, short_conv.causal_conv1d_states),
        (chunk_kda, kda.chunk_kda),
    ]
    pairs = [
        (fla_conv, short_conv, ["causal_conv1d_fwd", "causal_conv1d_bwd", "causal_conv1d_update"]),
        (layernorm, norms, ["layer_norm_fwd", "layer_norm_bwd"]),
        (fused_norm_gate, norms, ["layer_norm_gated_fwd", "layer_norm_gated_bwd"]),
        (l2norm, norms, ["l2norm_fwd", "l2norm_bwd"]),
        (fla_activations, activations, activations.__all__),
        (fla_rotary, rotary, rotary.__all__),
        (fla_loss, cross_entropy, ["cross_entropy_fwd", "cross_entropy_bwd"]),
        (fla_linear_loss, cross_entropy, ["fused_linear_cross_entropy_bwd"]),
    ]
    for theirs, ours, names in pairs:
        found += [(getattr(theirs, name), getattr(ours, name)) for name in names]
    return found


def _undispatched() -> list[tuple[Callable[..., Any], Callable[..., Any]]]:
    """Return pairs of an operator that fla calls directly and ours for it."""
    from fla.ops import delta_rule as fla_delta
    from fla.ops import gated_delta_product as fla_product
    from fla.ops import gated_delta_rule as fla_gated
    from fla.ops import kda as fla_kda

    return [
        (fla_delta.chunk_delta_rule, delta_rule.chunk_delta_rule),
        (fla_delta.fused_recurrent_delta_rule, delta_rule.fused_recurrent_delta_rule),
        (
            fla_gated.fused_recurrent_gated_delta_rule,
            gated_delta_rule.fused_recurrent_gated_delta_rule,
        ),
        (fla_product.chunk_gated_delta_product, gated_delta_product.chunk_gated_delta_product),
        (fla_kda.fused_recurrent_kda, kda.fused_recurrent_kda),
    ]


def _dispatching(
    entry: Callable[..., Any], implementation: Callable[..., Any]
) -> Callable[..., Any]:
    wrapped = dispatch(entry)
    register(wrapped, backend=CpuBackend, verifier=_accepts_cpu)(implementation)
    return wrapped


def replace(old: Callable[..., Any], new: Callable[..., Any]) -> None:
    """Rebind every name in fla's modules that is bound to `old` to `new`."""
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "fla" and module is not None:
            for attribute, value in list(vars(module).items()):
                if value is old:
                    setattr(module, attribute, new)


def _allow_cpu_loss() -> None:
    from fla.modules.fused_cross_entropy.ops import FusedCrossEntropyLoss

    theirs = FusedCrossEntropyLoss.forward

    @wraps(theirs)
    def forward(self: Any, input: Tensor, target: Tensor) -> Any:
        return (_cpu_loss if input.device.type == "cpu" else theirs)(self, input, target)

    FusedCrossEntropyLoss.forward = forward


def _cpu_loss(module: Any, logits: Tensor, target: Tensor) -> Any:
    from fla.modules.fused_cross_entropy.ops import cross_entropy_loss

    names = (
        "label_smoothing logit_scale lse_square_scale logit_softcapping ignore_index "
        "inplace_backward process_group"
    )
    options = {name: getattr(module, name) for name in names.split()}
    losses = cross_entropy_loss(logits, target, **options)
    if module.reduction != "none":
        losses = [loss.sum() for loss in losses]
    if module.reduction == "mean":
        losses = [loss / (target != module.ignore_index).sum() for loss in losses]
    return tuple(losses) if module.return_z_loss else losses[0]


def _allow_softmax_layers() -> None:
    from fla.layers import attn

    for name in softmax_attention.__all__:
        ours, theirs = getattr(softmax_attention, name), getattr(attn, name, None)
        setattr(attn, name, ours if theirs is None else _on_cpu(ours, theirs))


def _on_cpu(ours: Callable[..., Any], theirs: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(theirs)
    def attended(q: Tensor, *args: Any, **options: Any) -> Any:
        return (ours if q.device.type == "cpu" else theirs)(q, *args, **options)

    return attended
