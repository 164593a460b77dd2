"""The delta rule with a decay per key channel, for all chunks of all documents at once.

It is the WY form of `kernels.gated_delta_rule.wy` with decays by channel inside the products, which
come from `pairs.py`. `kernels/README.md` derives both. The backward is written by hand.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kernels.gated_delta_rule.recurrence import Carry, carry_gradients, carry_states
from kernels.gated_delta_rule.wy import unit_lower_inverse
from kernels.kda import pairs


def chunked_kda(
    q: Float[Tensor, "chunks H C K"],
    k: Float[Tensor, "chunks H C K"],
    v: Float[Tensor, "chunks H C V"],
    beta: Float[Tensor, "chunks H C"],
    g: Float[Tensor, "chunks H C K"],
    initial: Float[Tensor, "N H K V"],
    alive: tuple[int, ...],
    carry: Carry = carry_states,
) -> tuple[Float[Tensor, "chunks H C V"], Float[Tensor, "N H K V"]]:
    """Return the outputs and the final states; once differentiable.

    Args:
        q: scaled already.
        g: log-decays, at most 0.
        alive: how many of the N documents have an i-th chunk, for each i (`ChunkLayout`).
        carry: what runs from chunk to chunk; only `carry_states` has a backward.
    """
    return _ChunkedKda.apply(q, k, v, beta, g.to(q.dtype), initial, alive, carry)


class _ChunkedKda(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        g: Tensor,
        initial: Tensor,
        alive: tuple[int, ...],
        carry: Carry,
    ) -> tuple[Tensor, Tensor]:
        rate, decays = beta.unsqueeze(-1), pairs.decays(g)
        scores, products = pairs.pair_products(q, k, decays.levels)
        inverse = unit_lower_inverse(products * rate)
        u, w = inverse @ (v * rate), inverse @ (k * decays.start).mul_(rate)
        whole = decays.start[..., -1, :].unsqueeze(-1)
        v_new, out, states, final = carry(
            u, w, q * decays.start, k * decays.end, whole, initial, alive
        )
        out += scores @ v_new
        levels = [x for level in decays.levels for x in level]
        ctx.save_for_backward(
            q, k, v, beta, inverse, u, w, states, v_new, scores, products,
            decays.start, decays.end, *levels,
        )  # fmt: skip
        ctx.alive = alive
        return out, final

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        # Under activation checkpointing the saved tensors can be unpacked only once.
        q, k, v, beta, inverse, u, w, states, v_new, scores, products, *saved = ctx.saved_tensors
        start, end, *flat = saved
        levels = tuple(pairs.Level(*pair) for pair in zip(flat[::2], flat[1::2], strict=True))
        rate, dout, whole = beta.unsqueeze(-1), dout.contiguous(), start[..., -1, :].unsqueeze(-1)
        du = scores.mT @ dout
        dafter, dinitial = carry_gradients(
            du, dout, w, q * start, k * end, whole, dfinal, ctx.alive
        )
        dq_start, dk_rate = dout @ states.mT, (inverse.mT @ (du @ states.mT)).neg_()
        dv_rate, dscores = inverse.mT @ du, dout @ v_new.mT
        # Minus the gradient of the system, of which only the strict lower triangle counts.
        dsystem = (dk_rate @ w.mT).add_(dv_rate @ u.mT).tril_(-1).neg_()
        found = pairs.pair_products_backward(q, k, levels, dscores, dsystem * rate)
        drate = (dsystem.mul_(products)).sum(-1) + (dv_rate * v).sum(-1)
        drate += (dk_rate * k * start).sum(-1)
        dq_start.mul_(start)
        dk_start = (dk_rate * rate).mul_(start)
        dk_end = (v_new @ dafter.mT).mul_(end)
        dlog_start = (dq_start * q).addcmul_(dk_start, k)
        dlog_start[..., -1, :] += (dafter * states).sum(-1) * start[..., -1, :]
        dg = pairs.decays_backward(dlog_start, dk_end * k, found.dlevels)
        diagonal = dscores.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
        dq = (found.dq + dq_start).addcmul_(diagonal, k)
        dk = (found.dk_right + found.dk_left).add_(dk_start).add_(dk_end).addcmul_(diagonal, q)
        return dq, dk, dv_rate * rate, drate, dg, dinitial, None, None
