"""The best map of lower rank: a gate whose inner width shrinks, fitted in closed form.

A gate maps x to F A x, with A [d, hidden] and F [rows, d]. Its inner channels are u = A x, and
C = E[u uᵀ] is their second moment. Of all maps M of rank r, E‖(F A - M) x‖² is least for P F A,
where P projects onto the r leading left singular vectors of F C^1/2 (Eckart, Young and Mirsky,
for the map times the root of E[x xᵀ], whose left singular vectors are these).
"""

import torch
from jaxtyping import Float64
from torch import Tensor


def best_low_rank(
    second: Float64[Tensor, "rows d"],
    first: Float64[Tensor, "d hidden"],
    moment: Float64[Tensor, "d d"],
    rank: int,
) -> tuple[Float64[Tensor, "rows r"], Float64[Tensor, "r hidden"]]:
    """The factors of the map of rank `rank` that is nearest to `second @ first`.

    With rank d it is the same map. Where there are fewer rows than `rank`, the rest of the inner
    channels are zero. The columns of the first result have one length, the mean of those of
    `second`, so that both factors train as they did.

    Args:
        second: F, from inner channels to outputs.
        first: A, from inputs to inner channels.
        moment: C, or any positive multiple of it.
        rank: r, from 1 to d.

    Raises:
        ValueError: the moment holds a NaN or an infinity.
    """
    if not bool(moment.isfinite().all()):
        raise ValueError("the second moment of a gate's inner channels is not finite")
    values, vectors = torch.linalg.eigh(moment)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.mT
    left = torch.linalg.svd(second @ root, full_matrices=False).U
    # A singular vector has either sign: its largest entry is positive, on every machine.
    largest = left.gather(0, left.abs().argmax(0, keepdim=True))
    left = (left * largest.sign())[:, :rank]
    length = second.square().sum(0).mean().sqrt()
    length = length if length > 0 else torch.ones_like(length)
    down = left.mT @ second @ first / length
    missing = rank - left.shape[1]
    up = torch.nn.functional.pad(left * length, (0, missing))
    return up, torch.nn.functional.pad(down, (0, 0, 0, missing))
