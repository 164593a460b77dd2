"""The only sequential part of the chunked delta rule: the state that passes between chunks.

    V_new[c] = U[c] - W[c] S[c]
    S[c+1]   = gamma[c] S[c] + Kd[c]^T V_new[c]

Three products per step forward and three backward; the gradients of W, Kd and gamma are batched
over all chunks afterwards. Tensors are `[chunks, H, ...]`, chunks in the order of a `ChunkLayout`.
"""

import torch
from jaxtyping import Float
from torch import Tensor


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        u: Tensor,
        w: Tensor,
        k_end: Tensor,
        gamma: Tensor | None,
        initial: Tensor,
        alive: tuple[int, ...],
    ) -> tuple[Tensor, Tensor, Tensor]:
        chunks, heads = u.shape[:2]
        states = initial.new_empty(chunks, *initial.shape[1:])
        final, v_new = initial.clone(), torch.empty_like(u, memory_format=torch.contiguous_format)
        state, start = initial, 0
        for count in alive:
            block = slice(start, start + count)
            state = state[:count]
            states[block] = state
            new = _bmm(u[block], w[block], state, alpha=-1)
            v_new[block] = new
            kept = state if gamma is None else state * gamma[block]
            state = _bmm(kept, k_end[block].transpose(-1, -2), new)
            final[:count] = state
            start += count
        ctx.save_for_backward(w, k_end, gamma, states, v_new)
        ctx.alive = alive
        return v_new, states, final

    @staticmethod
    def backward(ctx, dv_new: Tensor, dstates: Tensor, dfinal: Tensor):
        w, k_end, gamma, states, v_new = ctx.saved_tensors
        du = torch.empty_like(v_new)
        dnext = torch.empty_like(states)
        dstate, start = dfinal.clone(), len(states)
        for count in reversed(ctx.alive):
            block = slice(start - count, start)
            after = dstate[:count]
            dnext[block] = after
            grad = _bmm(dv_new[block], k_end[block], after)
            du[block] = grad
            kept = after if gamma is None else after * gamma[block]
            kept = kept + dstates[block]
            dstate[:count] = _bmm(kept, w[block].transpose(-1, -2), grad, alpha=-1)
            start -= count
        dw = -(du @ states.transpose(-1, -2))
        dk_end = v_new @ dnext.transpose(-1, -2)
        dgamma = None if gamma is None else (dnext * states).sum((-1, -2), keepdim=True)
        return du, dw, dk_end, dgamma, dstate, None


def _bmm(base: Tensor, left: Tensor, right: Tensor, alpha: float = 1) -> Tensor:
    """Return `base + alpha * left @ right` over two batch dimensions."""
    batch = base.shape[:2]
    out = torch.baddbmm(base.flatten(0, 1), left.flatten(0, 1), right.flatten(0, 1), alpha=alpha)
    return out.unflatten(0, batch)


def chunk_recurrence(
    u: Float[Tensor, "chunks H C V"],
    w: Float[Tensor, "chunks H C K"],
    k_end: Float[Tensor, "chunks H C K"],
    gamma: Float[Tensor, "chunks H 1 1"] | None,
    initial: Float[Tensor, "N H K V"],
    alive: tuple[int, ...],
) -> tuple[Float[Tensor, "chunks H C V"], Float[Tensor, "chunks H K V"], Float[Tensor, "N H K V"]]:
    """Return the corrected values, the state before each chunk, and the final states.

    `initial` and the final states are in the layout's order of documents. Without `gamma`
    nothing decays.
    """
    return _Recurrence.apply(u, w, k_end, gamma, initial, alive)
