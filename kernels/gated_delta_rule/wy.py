"""The delta rule on all chunks of all documents at once, in the WY form.

`kernels/README.md` derives the form and the backward, which is written by hand: it needs no second
triangular solve and no float64 gradient of every pair's decay.

C tokens a chunk; N documents; H heads with keys of width K and values of width V.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from kernels.gated_delta_rule.recurrence import Carry, carry_gradients, carry_states


def chunked_delta_rule(
    q: Float[Tensor, "chunks H C K"],
    k: Float[Tensor, "chunks H C K"],
    v: Float[Tensor, "chunks H C V"],
    beta: Float[Tensor, "chunks H C"],
    g: Float[Tensor, "chunks H C"] | None,
    initial: Float[Tensor, "N H K V"],
    alive: tuple[int, ...],
    carry: Carry = carry_states,
) -> tuple[Float[Tensor, "chunks H C V"], Float[Tensor, "N H K V"]]:
    """Return the outputs and the final states; once differentiable.

    Args:
        q: scaled already.
        g: log-decays, summed in float64; None for no decay.
        alive: how many of the N documents have an i-th chunk, for each i (`ChunkLayout`).
        carry: what runs from chunk to chunk; only `carry_states` has a backward.
    """
    return _ChunkedDeltaRule.apply(q, k, v, beta, g, initial, alive, carry)


class _Decays(NamedTuple):
    """The decays inside each chunk; if nothing decays, all but `pairs` are None."""

    pairs: Float[Tensor, "... C C"]
    """Entry i, j: from token j to token i >= j; zero for i < j."""
    start: Float[Tensor, "chunks H C 1"] | None
    """From the start of the chunk to each token, the token's own decay included."""
    end: Float[Tensor, "chunks H C 1"] | None
    """From each token to the end of the chunk."""
    whole: Float[Tensor, "chunks H 1 1"] | None
    """Over the whole chunk."""


class _ChunkedDeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        g: Tensor | None,
        initial: Tensor,
        alive: tuple[int, ...],
        carry: Carry,
    ) -> tuple[Tensor, Tensor]:
        rate, decays = beta.unsqueeze(-1), _decays(g, k)
        products, raw_scores = k @ k.mT, q @ k.mT
        inverse = unit_lower_inverse((products * decays.pairs).mul_(rate))
        u = inverse @ (v * rate)
        w = inverse @ (k * (rate if decays.start is None else rate * decays.start))
        q_start, k_end = _decayed(q, decays.start), _decayed(k, decays.end)
        v_new, out, states, final = carry(u, w, q_start, k_end, decays.whole, initial, alive)
        _add_product_(out, raw_scores * decays.pairs, v_new)
        ctx.save_for_backward(
            q, k, v, beta, inverse, u, w, states, v_new, products, raw_scores, *decays
        )
        ctx.alive, ctx.gate_dtype = alive, None if g is None else g.dtype
        return out, final

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        # Under activation checkpointing the saved tensors can be unpacked only once.
        q, k, v, beta, inverse, u, w, states, v_new, *saved = ctx.saved_tensors
        products, raw_scores, *saved_decays = saved
        decays, dout, rate = _Decays(*saved_decays), dout.contiguous(), beta.unsqueeze(-1)
        du = (raw_scores * decays.pairs).mT @ dout
        q_start, k_end = _decayed(q, decays.start), _decayed(k, decays.end)
        dafter, dinitial = carry_gradients(
            du, dout, w, q_start, k_end, decays.whole, dfinal, ctx.alive
        )
        dq_start, dk_end = dout @ states.mT, v_new @ dafter.mT
        # W's right-hand side and its gradient have a minus each, which the system does not see.
        dv_rate, dminus_k = inverse.mT @ du, inverse.mT @ (du @ states.mT)
        dsystem = _add_product_(dminus_k @ w.mT, dv_rate, u.mT, alpha=-1)
        dsystem.mul_(decays.pairs).tril_(-1)
        dk_scaled = dminus_k.neg_() if decays.start is None else dminus_k.mul_(-decays.start)
        dproducts, along_k = dsystem * rate, (dk_scaled * k).sum(-1)
        drate = dsystem.mul_(products).sum(-1) + (dv_rate * v).sum(-1) + along_k
        dscores = (dout @ v_new.mT).mul_(decays.pairs)
        dg = None
        if decays.start is not None and decays.end is not None and decays.whole is not None:
            pairs = (dscores * raw_scores).addcmul_(dproducts, products)
            start = along_k * beta + (dq_start * q).sum(-1) * decays.start.squeeze(-1)
            end = (dk_end * k).sum(-1) * decays.end.squeeze(-1)
            whole = dafter.mul_(states).sum((-1, -2)).unsqueeze(-1) * decays.whole.squeeze(-1)
            dg = _gate_gradient(pairs, start, end, whole).to(ctx.gate_dtype)
        dq = _add_product_(_decayed_(dq_start, decays.start), dscores, k)
        dk = _decayed_(dk_end, decays.end).addcmul_(dk_scaled, rate)
        _add_product_(dk, dproducts + dproducts.mT, k)
        _add_product_(dk, dscores.mT, q)
        return dq, dk, dv_rate.mul_(rate), drate, dg, dinitial, None, None


def _decays(g: Float[Tensor, "chunks H C"] | None, like: Float[Tensor, "chunks H C K"]) -> _Decays:
    """Return the decays between tokens, given each token's log-decay, in the dtype of `like`.

    Sums and differences are float64: a chunk may decay by thousands of nats while two of its tokens
    lie a hundredth apart, which float32 sums would lose. What overflows above
    the diagonal is overwritten.
    """
    size = like.shape[-2]
    if g is None:
        return _Decays(like.new_ones(size, size).tril_(), None, None, None)
    total = g.cumsum(-1, dtype=torch.float64)
    pairs = (total.unsqueeze(-1) - total.unsqueeze(-2)).to(like.dtype)
    pairs.exp_().tril_()
    start = total.to(like.dtype).exp().unsqueeze(-1)
    end = (total[..., -1:] - total).to(like.dtype).exp().unsqueeze(-1)
    return _Decays(pairs, start, end, start[..., -1:, :])


def unit_lower_inverse(lower: Float[Tensor, "chunks H C C"]) -> Float[Tensor, "chunks H C C"]:
    """Return `(I + L)^-1`, L being the strict lower triangle of `lower`; the rest is not read.

    Solved in blocks, because a solve of twice the size takes four times as long, and joined in
    pairs: `[A 0; B C]^-1 = [A^-1 0; -C^-1 B A^-1 C^-1]`. For a few matrices 32 is the better block.
    """
    size = lower.shape[-1]
    matrices = lower.reshape(-1, size, size)
    block = min(size, 16 if len(matrices) >= 32 else 32)
    inverse = torch.zeros_like(matrices)
    eye = torch.eye(block, dtype=lower.dtype, device=lower.device).expand(len(matrices), -1, -1)
    for at in range(0, size, block):
        here = slice(at, at + block)
        inverse[:, here, here] = torch.linalg.solve_triangular(
            matrices[:, here, here], eye, upper=False, unitriangular=True
        )
    while block < size:
        for at in range(0, size, 2 * block):
            left, right = slice(at, at + block), slice(at + block, at + 2 * block)
            joined = matrices[:, right, left] @ inverse[:, left, left]
            inverse[:, right, left] = (inverse[:, right, right] @ joined).neg_()
        block *= 2
    return inverse.view_as(lower)


def _gate_gradient(
    pairs: Float[Tensor, "chunks H C C"],
    start: Float[Tensor, "chunks H C"],
    end: Float[Tensor, "chunks H C"],
    whole: Float[Tensor, "chunks H 1"],
) -> Float[Tensor, "chunks H C"]:
    """Return the gradient of the log-decays, given those of the logarithms of all decays."""
    dtotal = pairs.sum(-1) - pairs.sum(-2) + start - end
    dtotal[..., -1:] += end.sum(-1, keepdim=True) + whole
    return dtotal.flip(-1).cumsum(-1).flip(-1)


def _decayed(x: Tensor, decay: Tensor | None) -> Tensor:
    return x if decay is None else x * decay


def _decayed_(x: Tensor, decay: Tensor | None) -> Tensor:
    return x if decay is None else x.mul_(decay)


def _add_product_(base: Tensor, left: Tensor, right: Tensor, alpha: float = 1) -> Tensor:
    """Add `alpha * left @ right` to `base`, over two batch dimensions, and return it."""
    batched = [x.flatten(0, 1) for x in (base, left, right)]
    batched[0].baddbmm_(*batched[1:], alpha=alpha)
    return base
