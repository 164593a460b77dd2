"""The delta rule token by token in the dtype of its input, and inputs that hurt."""

import torch
import torch.nn.functional as F
from torch import Tensor


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    initial_state: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return outputs `[B, T, H, V]` and final states `[B, H, K, V]`; `g` per head or channel."""
    groups = v.shape[2] // k.shape[2]
    q, k = q.repeat_interleave(groups, 2), k.repeat_interleave(groups, 2)
    state = v.new_zeros(v.shape[0], v.shape[2], k.shape[3], v.shape[3])
    state = state if initial_state is None else initial_state
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    out = []
    for t in range(q.shape[1]):
        if g is not None:
            decay = g[:, t].exp()
            state = state * (decay[..., None, None] if g.ndim == 3 else decay.unsqueeze(-1))
        change = v[:, t] - torch.einsum("bhkv,bhk->bhv", state, k[:, t])
        update = change * beta[:, t, :, None]
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], update)
        out.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]) * scale)
    return torch.stack(out, 1), state


def gate(g: Tensor, A_log: Tensor, dt_bias: Tensor | None) -> Tensor:
    return -A_log.exp() * F.softplus(g if dt_bias is None else g + dt_bias)


def inputs(
    tokens: int,
    d_k: int,
    d_v: int,
    *,
    batch: int = 1,
    key_heads: int = 2,
    heads: int = 2,
    states: int | None = None,
    decay: float = 1.0,
    channel_decay: bool = False,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Return leaves that need gradients: q, k (unit length), v, g (mean -decay), beta, h."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    made = {
        "q": F.normalize(normal(batch, tokens, key_heads, d_k), dim=-1),
        "k": F.normalize(normal(batch, tokens, key_heads, d_k), dim=-1),
        "v": normal(batch, tokens, heads, d_v),
        "g": -decay * normal(batch, tokens, heads, *[d_k] * channel_decay).abs(),
        "beta": normal(batch, tokens, heads).sigmoid(),
        "h": normal(batch if states is None else states, heads, d_k, d_v),
    }
    return {name: x.to(dtype).requires_grad_() for name, x in made.items()}


def gradients(outputs: tuple[Tensor, ...], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the gradients of the leaves under fixed random cotangents of the outputs."""
    generator = torch.Generator().manual_seed(7)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in outputs]
    loss = sum((x * w.to(x.dtype)).sum() for x, w in zip(outputs, weights, strict=True))
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {name: grad for name, grad in zip(leaves, found, strict=True) if grad is not None}
