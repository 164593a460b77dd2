"""Putting our decode step under fla 0.6.0's layers.

The forward of DeltaNet, GatedDeltaNet and KDA layers is wrapped: a cached token goes to the fused
step of `kernels.decode_step`, all else to fla's forward. `SLIMSTATE_KERNELS=fla` is read at each
call and forces theirs (`kernels.triton_support`). A layer whose recurrent operator somebody has
replaced since, to watch or to change what it does, keeps fla's forward too: that calls it.
"""

import sys
from collections.abc import Callable
from functools import cache, wraps
from typing import Any

from torch import Tensor

from kernels.decode_step import fla_layers


@cache
def install() -> None:
    """Make cached one-token decoding of fla's layers run our step; again, it does nothing.

    What `fla_cpu` replaces must be in place, so that its operators count as fla's own.
    """
    layer_class: Any
    for layer_class, operator in fla_layers.OPERATORS.items():
        layer_class.forward = _with_our_step(layer_class, operator)


def _with_our_step(layer_class: Any, operator: str) -> Callable[..., Any]:
    theirs = layer_class.forward
    module = sys.modules[layer_class.__module__]
    original = getattr(module, operator)

    @wraps(theirs)
    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        output_attentions: bool | None = False,
        **kwargs: Any,
    ) -> tuple[Tensor, None, Any]:
        options = (attention_mask, past_key_values, use_cache)
        if type(self) is layer_class and getattr(module, operator) is original:
            out = fla_layers.decoded(self, hidden_states, *options, **kwargs)
            if out is not None:
                return out, None, past_key_values
        return theirs(self, hidden_states, *options, output_attentions, **kwargs)

    return forward
