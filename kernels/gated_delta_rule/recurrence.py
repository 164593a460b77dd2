"""The only sequential part of the chunked delta rule: the state that passes between chunks.

    V_new[c] = U[c] - W[c] S[c]
    S[c+1]   = gamma[c] S[c] + Kd[c]^T V_new[c]

A step is two products forward and two backward. Tensors are `[chunks, H, ...]` with the chunks in
the order of a `ChunkLayout`, whose `alive` counts the documents that each step advances. Kd are the
keys times their decay to the end of the chunk (`k_end`), gamma the decay over the chunk.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def carry_states(
    u: Float[Tensor, "chunks H C V"],
    w: Float[Tensor, "chunks H C K"],
    k_end: Float[Tensor, "chunks H C K"],
    gamma: Float[Tensor, "chunks H 1 1"] | None,
    initial: Float[Tensor, "N H K V"],
    alive: tuple[int, ...],
) -> tuple[Float[Tensor, "chunks H C V"], Float[Tensor, "chunks H K V"], Float[Tensor, "N H K V"]]:
    """Return V_new, the state before each chunk, and the final states.

    `initial` and the final states are in the layout's order of documents. `gamma` None means that
    nothing decays.
    """
    states = initial.new_empty(u.shape[0], *initial.shape[1:])
    final, v_new = initial.clone(), torch.empty_like(u, memory_format=torch.contiguous_format)
    state, start = initial, 0
    for count in alive:
        block = slice(start, start + count)
        state = state[:count]
        states[block] = state
        _bmm(u[block], w[block], state, alpha=-1, out=v_new[block])
        kept = state if gamma is None else state * gamma[block]
        state = final[:count]
        _bmm(kept, k_end[block].transpose(-1, -2), v_new[block], out=state)
        start += count
    return v_new, states, final


def carry_gradients(
    dv_new: Float[Tensor, "chunks H C V"],
    dstates: Float[Tensor, "chunks H K V"],
    dfinal: Float[Tensor, "N H K V"],
    w: Float[Tensor, "chunks H C K"],
    k_end: Float[Tensor, "chunks H C K"],
    gamma: Float[Tensor, "chunks H 1 1"] | None,
    alive: tuple[int, ...],
) -> tuple[Float[Tensor, "chunks H C V"], Float[Tensor, "chunks H K V"], Float[Tensor, "N H K V"]]:
    """Return the gradients of `u`, of the state after each chunk, and of the initial states.

    `dv_new` and `dstates` are the outputs' gradients of V_new and of the states before each chunk;
    both are overwritten.
    """
    dafter = torch.empty_like(dstates)
    dstate, start = dfinal.clone(), dstates.shape[0]
    for count in reversed(alive):
        block = slice(start - count, start)
        after = dafter[block]
        after.copy_(dstate[:count])
        _bmm(dv_new[block], k_end[block], after, out=dv_new[block])
        kept = dstates[block]
        kept += after if gamma is None else after * gamma[block]
        _bmm(kept, w[block].transpose(-1, -2), dv_new[block], alpha=-1, out=dstate[:count])
        start -= count
    return dv_new, dafter, dstate


def _bmm(base: Tensor, left: Tensor, right: Tensor, *, out: Tensor, alpha: float = 1) -> None:
    """Write `base + alpha * left @ right` over two batch dimensions to `out`."""
    batched = [x.flatten(0, 1) for x in (base, left, right)]
    torch.baddbmm(*batched, alpha=alpha, out=out.view(-1, *out.shape[2:]))
