"""Taps: what a model's token mixers see while it runs, delivered layer by layer.

The delta-rule tap replaces the operator in the namespace of the layer's module, where fla's layers
look it up, for as long as the context is open. Hooks on the convolutions would miss the training
path, which concatenates the conv weights and never calls the modules. Whatever the name is bound to
when the tap opens, fla's kernel or another implementation, is what runs; it sees its own arguments
and the tap changes nothing. Which layer a call belongs to is known from a pre-hook on the mixer.

So it works on a plain model, under FSDP2, with activation checkpointing without a backward pass,
and with adapters attached, in training mode and not, for chunks and for single tokens.
"""

import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pruning.adapters.interface import Adapter, Site
from pruning.mixers import find_mixers, output_projection
from pruning.op_call import (
    OpCall,
    arguments_by_name,
    log_decay,
    unroll_,
    writing_strength,
)


@contextmanager
def tap_ops(
    model: nn.Module, adapter: Adapter, on_call: Callable[[OpCall], None]
) -> Iterator[None]:
    """Call `on_call` with each delta-rule call of `model` while the context is open.

    q and k are those before the L2 norm in every configuration: fla normalises inside the operator
    for `qk_norm="l2"`, so they are the operator's arguments; for `qk_norm="sum"` the layer divides
    by the sum before the call, so the arguments of that function are taken instead. Calls of other
    models, a teacher's for one, are not reported. Recomputation in a backward pass is reported
    again, so leave activation checkpointing off where gradients are needed.
    """
    listener = _Listener(on_call)
    with ExitStack() as stack:
        for layer, mixer in find_mixers(model, adapter).items():
            stack.enter_context(_entering(mixer, layer, listener))
        for site in adapter.op_sites:
            stack.enter_context(replaced(site, listener.wrap_op))
        for site in adapter.norm_sites:
            stack.enter_context(replaced(site, listener.wrap_norm))
        yield


@contextmanager
def tap_mixer_inputs(
    model: nn.Module, adapter: Adapter, on_input: Callable[[int, Tensor], None]
) -> Iterator[None]:
    """Call `on_input(layer, x)` with the hidden states that enter each mixer of `model`.

    x is [tokens, hidden], detached, padding left out where the mixer is given an attention mask.
    """

    def deliver(layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            on_input(layer, _real_tokens(*args, **kwargs))

        return hook

    with ExitStack() as stack:
        for layer, mixer in find_mixers(model, adapter).items():
            handle = mixer.register_forward_pre_hook(deliver(layer), with_kwargs=True)
            stack.callback(handle.remove)
        yield


@contextmanager
def tap_mixer_outputs(
    model: nn.Module, adapter: Adapter, on_output: Callable[[int, Tensor], None]
) -> Iterator[None]:
    """Call `on_output(layer, z)` with what each mixer of `model` gives to its output projection.

    z is [tokens, value heads * d_v], after norm and gate, detached. Mixers leave padding out.
    """

    def deliver(layer: int) -> Callable[..., None]:
        return lambda module, args: on_output(layer, args[0].detach().flatten(0, -2))

    with ExitStack() as stack:
        for layer, mixer in find_mixers(model, adapter).items():
            hook = output_projection(mixer).register_forward_pre_hook(deliver(layer))
            stack.callback(hook.remove)
        yield


def operator_for(adapter: Adapter) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The chunk operator that takes a family's calls as `OpCall` has them: one row is one step.

    It runs fla's kernel on CUDA and ours on a CPU.
    """
    import flame.register  # noqa: F401

    site = next(site for site in adapter.op_sites if "chunk" in site.attribute)
    module, name = _OPERATORS.get(site.attribute, site)
    return getattr(importlib.import_module(module), name)


_GATED = Site("fla.ops.gated_delta_rule", "chunk_gated_delta_rule")
_OPERATORS = {
    "chunk_gated_delta_product": _GATED,
    "torch_chunk_gated_delta_rule": _GATED,
    "chunk_kimi_delta_attention": Site("fla.ops.kda", "chunk_kda"),
}
"""What runs the calls of an operator that takes several rows a token, once they are unrolled, and
those of transformers' name for fla's operator."""


class _Listener:
    """Knows which layer runs, and turns its operator calls into `OpCall`s."""

    def __init__(self, on_call: Callable[[OpCall], None]) -> None:
        self.on_call = on_call
        self.layer: int | None = None
        self.steps: int | None = None
        self.unnormalised: list[Tensor] = []
        self.heads: list[tuple[int, ...]] = []

    def enter(self, layer: int, mixer: nn.Module) -> None:
        self.layer, self.steps = layer, getattr(mixer, "num_householder", None)
        self.heads = list(getattr(mixer, "heads_of_calls", ()))
        self.unnormalised.clear()

    def leave(self) -> None:
        self.layer = None
        self.unnormalised.clear()

    def wrap_op(self, op: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(op)

        def tapped(*args: Any, **kwargs: Any) -> Any:
            if self.layer is not None:
                self.report(self.layer, arguments_by_name(signature, args, kwargs))
            return op(*args, **kwargs)

        return tapped

    def wrap_norm(self, norm: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def tapped(x: Tensor) -> Tensor:
            if self.layer is not None:
                self.unnormalised.append(x)
            return norm(x)

        return tapped

    def report(self, layer: int, arguments: dict[str, Any]) -> None:
        # The layer normalises q, then k; with the norm inside the operator nothing was recorded.
        q, k = self.unnormalised or (arguments["q"], arguments["k"])
        with torch.no_grad():
            call = OpCall(
                layer=layer,
                q=q.detach(),
                k=k.detach(),
                v=arguments["v"].detach(),
                beta=writing_strength(arguments),
                g=log_decay(arguments),
                cu_seqlens=arguments.get("cu_seqlens"),
                given_k=arguments["k"].detach(),
                normalizes=bool(arguments.get("use_qk_l2norm_in_kernel", False)),
            )
            if self.steps is not None:
                unroll_(call, self.steps)
        if self.heads:
            call.heads = self.heads.pop(0)
        self.unnormalised.clear()
        self.on_call(call)


@contextmanager
def _entering(mixer: nn.Module, layer: int, listener: _Listener) -> Iterator[None]:
    before = mixer.register_forward_pre_hook(lambda module, args: listener.enter(layer, module))
    # always_call: a forward pass that raises must not leave its layer behind.
    after = mixer.register_forward_hook(
        lambda module, args, out: listener.leave(), always_call=True
    )
    try:
        yield
    finally:
        before.remove()
        after.remove()


@contextmanager
def replaced(site: Site, wrap: Callable[[Callable], Callable]) -> Iterator[None]:
    """Bind a site's name to `wrap` of what it is bound to, while the context is open."""
    module = importlib.import_module(site.module)
    original = getattr(module, site.attribute)
    setattr(module, site.attribute, wrap(original))
    try:
        yield
    finally:
        setattr(module, site.attribute, original)


def _real_tokens(
    hidden_states: Tensor, attention_mask: Tensor | None = None, **_: Any
) -> Float[Tensor, "n hidden"]:
    x = hidden_states.detach()
    if attention_mask is None:
        return x.flatten(0, 1)
    return x[attention_mask[:, -x.shape[1] :].bool()]
