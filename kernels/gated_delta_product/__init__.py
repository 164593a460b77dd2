"""Gated DeltaProduct (arXiv 2502.10297): several delta-rule steps a token, one decay, one output.

A token with n keys is n tokens of the gated delta rule: the first decays, the last is read. So the
sequence is spread to n times its length and runs on that core.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kernels.gated_delta_rule.chunk import Options, delta_rule

__all__ = ["chunk_gated_delta_product"]


def chunk_gated_delta_product(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B nT H K"],
    v: Float[Tensor, "B nT H V"],
    g: Float[Tensor, "B T H"] | None,
    beta: Float[Tensor, "B nT H"],
    num_householder: int,
    scale: float | None = None,
    initial_state: Float[Tensor, "N H K V"] | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    cp_context: Any = None,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "N H K V"] | None]:
    """Return outputs and final states; the signature is that of fla 0.6.0's operator.

    The n keys of token t are rows n t to n t + n - 1 of `k`, `v` and `beta`, used in this order;
    `cu_seqlens` counts tokens. `scale` is `K ** -0.5` unless given. Computes in float32 (fla's
    Triton kernel refuses it), in float64 for float64 input. Raises ValueError for shapes that do
    not fit, NotImplementedError for context parallelism.
    """
    if cp_context is not None:
        raise NotImplementedError("context parallelism has no CPU path: leave cp_context out")
    n = num_householder
    _check(q, k, v, beta, g, n)
    bounds = cu_seqlens if cu_seqlens_cpu is None else cu_seqlens_cpu
    flags = (output_final_state, use_qk_l2norm_in_kernel)
    options = Options(scale, initial_state, *flags, None if bounds is None else bounds * n)
    decays = None if g is None else spread(g, n, 0)
    o, state = delta_rule(spread(q, n, n - 1), k, v, beta, decays, options)
    return o[:, n - 1 :: n].contiguous(), state


def spread(x: Float[Tensor, "B T ..."], n: int, place: int) -> Float[Tensor, "B nT ..."]:
    """Return each token as n rows, itself at `place` and zeros at the others."""
    if n == 1:
        return x
    zeros = torch.zeros_like(x)
    return torch.stack([x if i == place else zeros for i in range(n)], 2).flatten(1, 2)


def _check(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, n: int) -> None:
    batch, tokens, heads, width = q.shape
    expected = (batch, n * tokens, heads)
    for name, x in (("k", k), ("v", v), ("beta", beta)):
        if x.shape[:3] != expected or (name == "k" and x.shape[3] != width):
            raise ValueError(
                f"{name} has shape {tuple(x.shape)} for q {tuple(q.shape)} and {n} householder "
                f"steps: must start with {expected}"
            )
    if g is not None and g.shape != q.shape[:3]:
        raise ValueError(f"g has shape {tuple(g.shape)}, must be {tuple(q.shape[:3])}")
