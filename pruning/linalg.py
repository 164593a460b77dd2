"""Strong rank-revealing QR in Gram form."""

from jaxtyping import Float64, Int64
from torch import Tensor


def strong_rrqr(
    gram: Float64[Tensor, "*batch d d"], k: int, f: float = 1.5, max_swaps: int | None = None
) -> Int64[Tensor, "*batch k"]:
    """The k columns of M, in increasing order, that strong rank-revealing QR selects from MᵀM."""
    raise NotImplementedError
