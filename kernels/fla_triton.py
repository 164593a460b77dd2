"""Putting our Triton kernels under fla 0.6.0, for the tensors of an accelerator.

fla's chunked operators are made of steps. Those that grow with the key width are registered in
`fla.backends`, with `kernels.narrow_chunks.refusal` to say which calls stay fla's; so the gated
delta rule, the delta rule and what else is made of these steps take ours in the same autograd
functions. The delta rule's own two steps, which fla does not dispatch, are wrapped in its
dispatcher.
"""

from functools import cache
from typing import Any

from fla.backends import BaseBackend, dispatch, register
from fla.ops.delta_rule import wy_fast

from kernels import narrow_chunks
from kernels.fla_cpu import replace


class NarrowChunksBackend(BaseBackend):
    """The backend that takes the calls that `narrow_chunks.refusal` does not refuse."""

    backend_type = "slimstate_narrow_chunks"
    priority = -1

    def verify(self, function_name: str, *args: Any, **kwargs: Any) -> tuple[bool, str | None]:
        reason = narrow_chunks.refusal(function_name, kwargs)
        return reason is None, reason


class CommonBackend(NarrowChunksBackend):
    """Ours for the steps that fla's chunked operators share."""

    chunk_gated_delta_rule_fwd_h = staticmethod(narrow_chunks.chunk_gated_delta_rule_fwd_h)
    chunk_gated_delta_rule_bwd_dhu = staticmethod(narrow_chunks.chunk_gated_delta_rule_bwd_dhu)
    chunk_fwd_o = staticmethod(narrow_chunks.chunk_fwd_o)
    chunk_bwd_dv_local = staticmethod(narrow_chunks.chunk_bwd_dv_local)
    chunk_bwd_dqkwg = staticmethod(narrow_chunks.chunk_bwd_dqkwg)


class GatedDeltaRuleBackend(NarrowChunksBackend):
    """Ours for the steps that the gated delta rule has to itself."""

    recompute_w_u_fwd = staticmethod(narrow_chunks.recompute_w_u_fwd)
    prepare_wy_repr_bwd = staticmethod(narrow_chunks.prepare_wy_repr_bwd)


@cache
def install() -> None:
    """Let fla's operators call our kernels; calling it again does nothing."""
    register("common")(CommonBackend)
    register("gated_delta_rule")(GatedDeltaRuleBackend)
    for entry, implementation in (
        (wy_fast.recompute_w_u_fwd, narrow_chunks.recompute_w_u_fwd),
        (wy_fast.prepare_wy_repr_bwd, _ungated_gradients),
    ):
        wrapped = dispatch(entry)
        register(wrapped, backend=NarrowChunksBackend)(implementation)
        replace(entry, wrapped)


def _ungated_gradients(**arguments: Any) -> tuple[Any, ...]:
    """`prepare_wy_repr_bwd` as the delta rule calls it: without decay, and without its gradient."""
    return narrow_chunks.prepare_wy_repr_bwd(**arguments)[:3]
