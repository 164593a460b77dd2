"""The delta rule on all chunks of all documents at once, in the WY form.

`kernels/README.md` derives the form and the backward, which is written by hand: it needs no second
triangular solve and no float64 gradient of every pair's decay.

C tokens a chunk; N documents; H heads with keys of width K and values of width V.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from kernels.gated_delta_rule.recurrence import carry_gradients, carry_states


def chunked_delta_rule(
    q: Float[Tensor, "chunks H C K"],
    k: Float[Tensor, "chunks H C K"],
    v: Float[Tensor, "chunks H C V"],
    beta: Float[Tensor, "chunks H C"],
    g: Float[Tensor, "chunks H C"] | None,
    initial: Float[Tensor, "N H K V"],
    alive: tuple[int, ...],
) -> tuple[Float[Tensor, "chunks H C V"], Float[Tensor, "N H K V"]]:
    """Return the outputs and the final states; once differentiable.

    Args:
        q: scaled already.
        g: log-decays, summed in float64; None for no decay.
        alive: how many of the N documents have an i-th chunk, for each i (`ChunkLayout`).
    """
    return _ChunkedDeltaRule.apply(q, k, v, beta, g, initial, alive)


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
    ) -> tuple[Tensor, Tensor]:
        rate, decays = beta.unsqueeze(-1), _decays(g, k)
        inverse = unit_lower_inverse(((k * rate) @ k.mT).mul_(decays.pairs))
        solved = inverse @ torch.cat([v * rate, _decayed(k * rate, decays.start)], -1)
        u, w = solved.split([v.shape[-1], k.shape[-1]], -1)
        k_end = _decayed(k, decays.end)
        v_new, states, final = carry_states(u, w, k_end, decays.whole, initial, alive)
        out = (q @ k.mT).mul_(decays.pairs) @ v_new
        out += _decayed(q, decays.start) @ states
        ctx.save_for_backward(q, k, v, beta, inverse, solved, states, v_new, *decays)
        ctx.alive, ctx.gate_dtype = alive, None if g is None else g.dtype
        return out, final

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        # Under activation checkpointing the saved tensors can be unpacked only once.
        q, k, v, beta, inverse, solved, states, v_new, *saved_decays = ctx.saved_tensors
        decays, dout = _Decays(*saved_decays), dout.contiguous()
        raw_scores, dscores = q @ k.mT, (dout @ v_new.mT).mul_(decays.pairs)
        dq_start = dout @ states.mT
        du, dafter, dinitial = carry_gradients(
            (raw_scores * decays.pairs).mT @ dout,
            _decayed(q, decays.start).mT @ dout,
            dfinal,
            solved[..., v.shape[-1] :],
            _decayed(k, decays.end),
            decays.whole,
            ctx.alive,
        )
        dk_end = v_new @ dafter.mT
        dright = inverse.mT @ torch.cat([du, (du @ states.mT).neg_()], -1)
        dv_rate, dk_rate = dright.split([v.shape[-1], k.shape[-1]], -1)
        # Minus the gradient of the system times the decays; only the strict lower triangle counts.
        dsystem = (dright @ solved.mT).mul_(decays.pairs).tril_(-1).neg_()
        products, rate = k @ k.mT, beta.unsqueeze(-1)
        dk_scaled, dproducts = _decayed(dk_rate, decays.start), dsystem * rate
        along_k = (dk_scaled * k).sum(-1)
        drate = (dsystem.mul_(products)).sum(-1) + (dv_rate * v).sum(-1) + along_k
        dq = (dscores @ k).add_(_decayed(dq_start, decays.start))
        dk = (dproducts + dproducts.mT) @ k
        dk += dscores.mT @ q
        dk.addcmul_(dk_scaled, rate).add_(_decayed(dk_end, decays.end))
        dg = None
        if decays.whole is not None:
            pairs = dscores.mul_(raw_scores).add_(dproducts.mul_(products))
            start = along_k * beta + (_decayed(dq_start, decays.start) * q).sum(-1)
            end = (_decayed(dk_end, decays.end) * k).sum(-1)
            whole = ((dafter * states).sum((-1, -2), keepdim=True) * decays.whole).squeeze(-1)
            dg = _gate_gradient(pairs, start, end, whole).to(ctx.gate_dtype)
        return dq, dk, dv_rate * rate, drate, dg, dinitial, None


def _decays(g: Float[Tensor, "chunks H C"] | None, like: Float[Tensor, "chunks H C K"]) -> _Decays:
    """Return the decays between tokens, given each token's log-decay, in the dtype of `like`.

    Sums and differences are float64: a chunk may decay by thousands of nats while two of its tokens
    lie a hundredth apart, which float32 sums would lose. What lies above the diagonal is masked
    before `exp`.
    """
    size = like.shape[-2]
    lower = torch.ones(size, size, dtype=torch.bool, device=like.device).tril()
    if g is None:
        return _Decays(lower.to(like.dtype), None, None, None)
    total = g.cumsum(-1, dtype=torch.float64)
    pairs = (total.unsqueeze(-1) - total.unsqueeze(-2)).to(like.dtype)
    pairs.masked_fill_(~lower, -torch.inf).exp_()
    start = total.to(like.dtype).exp().unsqueeze(-1)
    end = (total[..., -1:] - total).to(like.dtype).exp().unsqueeze(-1)
    return _Decays(pairs, start, end, start[..., -1:, :])


def unit_lower_inverse(lower: Float[Tensor, "chunks H C C"]) -> Float[Tensor, "chunks H C C"]:
    """Return `(I + L)^-1`, L being the strict lower triangle of `lower`; the rest is not read."""
    eye = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
    return torch.linalg.solve_triangular(
        lower, eye.expand_as(lower), upper=False, unitriangular=True
    )


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
