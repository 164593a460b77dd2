"""The ridge regression of `--repair output`, from sums over tokens."""

import torch
from jaxtyping import Float64
from torch import Tensor

RIDGE = 1e-2
"""λ of the ridge regression, as a part of the mean of the diagonal of Σ z' z'ᵀ."""


def fitted_projection(
    dense: Float64[Tensor, "hidden out"],
    pruned: Float64[Tensor, "hidden kept"],
    gram: Float64[Tensor, "kept kept"],
    cross: Float64[Tensor, "out kept"],
) -> Float64[Tensor, "hidden kept"]:
    """The W that minimises Σ ‖W z' − W₀ z‖² + λ ‖W − W₁‖², with λ = `RIDGE` · trace(gram) / kept.

    W₀ is the dense projection, W₁ what pruning leaves of it, z and z' what dense and pruned layer
    give to them. A bias of the projection is the same in both, and takes no part.

    Args:
        dense: W₀.
        pruned: W₁.
        gram: Σ z' z'ᵀ.
        cross: Σ z z'ᵀ.

    Raises:
        ValueError: the sums are not finite, or z' is zero for all tokens.
    """
    if not bool(gram.isfinite().all() and cross.isfinite().all()):
        raise ValueError("the sums hold a NaN or an infinity")
    ridge = RIDGE * gram.trace() / len(gram)
    if not bool(ridge > 0):
        raise ValueError("the pruned layer gives zeros to its output projection for all tokens")
    damped = (gram + gram.mT) / 2
    damped.diagonal().add_(ridge)
    target = dense @ cross + ridge * pruned
    return torch.cholesky_solve(target.mT, torch.linalg.cholesky(damped)).mT.contiguous()
