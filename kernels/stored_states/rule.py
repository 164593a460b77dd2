"""The delta rule with states that are stored, and so rounded, after each token."""

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from kernels.gated_delta_rule.chunk import Options, delta_rule
from kernels.gated_delta_rule.recurrence import carry_stored
from kernels.gated_delta_rule.wy import chunked_delta_rule
from kernels.kda.wy import chunked_kda
from kernels.stored_states.storage import StateStorage


@torch.no_grad()
def stored_delta_rule(
    q: Float[Tensor, "B R Hk K"],
    k: Float[Tensor, "B R Hk K"],
    v: Float[Tensor, "B R H V"],
    beta: Float[Tensor, "B R H"],
    g: Float[Tensor, "B R H *K"] | None,
    options: Options,
    storage: StateStorage,
    steps: int = 1,
) -> tuple[Float[Tensor, "B R H V"], Tensor | None]:
    """Return outputs and final states where each token reads the state that the last one stored.

    A token's own output comes from the state before it is stored, as in the engines' kernels.
    Plain PyTorch on any device, one token after another, all documents and heads at once; a final
    state is one that was stored, in the width that `delta_rule` computes in. No gradients.

    Args:
        g: log-decays of heads or of key channels; None for no decay.
        options: as `delta_rule` takes them.
        steps: rows of a token, which are computed without a store between them (a delta product).

    Raises:
        ValueError: shapes or document boundaries do not fit.
    """
    per_channel = g is not None and g.ndim > beta.ndim
    rule = chunked_kda if per_channel else chunked_delta_rule
    # The decay per channel is worked out for chunks of a power of two.
    assert not per_channel or steps & (steps - 1) == 0, f"{steps} rows a token"
    carry = partial(carry_stored, store=storage.store())
    return delta_rule(q, k, v, beta, g, options, steps, partial(rule, carry=carry))
