"""Allocation: one threshold on the scores of many heads shares out what a uniform budget keeps.

The total of a kind stays that of the uniform budget, among the heads that stay; of one kind alone,
key or value channels, so does the state. For whole heads shared over the model a ratio counts on
the heads of all layers, so that it is met more closely than layer by layer. In each head the
channels are taken in the order of their scores, in steps of one multiple. A step is worth the sum
of its channels' scores, so the steps of a head are worth less and less; every head gets its first
step, and the most valuable of all other steps are taken until the total is reached. What is kept
is therefore, up to the granularity of the steps, what lies above one threshold, and no other shares
of the same total would keep a larger sum of scores.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float64
from torch import Tensor

from pruning.spaces import Space


def shared_widths(
    scores: Mapping[str, Float64[Tensor, "H d"]], total: int, multiple: int
) -> dict[str, tuple[int, ...]]:
    """Kept channels of each head of each space, `total` of them together.

    Ties go to the earlier space, head and step.

    Args:
        scores: of the spaces that share one total, by name; larger for what matters more.
        total: channels of all heads together, a multiple of `multiple`.
        multiple: all widths are multiples of this.

    Raises:
        ValueError: a score is NaN or infinite.
    """
    for name, of_space in scores.items():
        if not bool(of_space.isfinite().all()):
            raise ValueError(f"{name}: the scores hold a NaN or an infinity")
    steps = [_steps(row, multiple) for of_space in scores.values() for row in of_space.cpu()]
    counts = _counts(steps, total // multiple)
    widths = iter(count * multiple for count in counts)
    return {name: tuple(next(widths) for _ in of_space) for name, of_space in scores.items()}


def groups(spaces: Sequence[Space], allocate: str) -> list[list[Space]]:
    """The spaces that share one total: those of a layer and kind, or of the model and kind."""
    found: dict[object, list[Space]] = {}
    for space in spaces:
        key = (space.kind, space.layer) if allocate == "layer" else (space.kind, None)
        found.setdefault(key, []).append(space)
    return list(found.values())


def _steps(row: Float64[Tensor, " d"], multiple: int) -> Float64[Tensor, " n"]:
    """What each step of a head is worth; a rest that is no whole multiple is left out."""
    whole = len(row) // multiple * multiple
    return row.sort(descending=True).values[:whole].view(-1, multiple).sum(1)


def _counts(steps: Sequence[Tensor], total: int) -> list[int]:
    """Steps of each head: its first one, and the best of all others."""
    heads = torch.cat([torch.full((len(row) - 1,), head) for head, row in enumerate(steps)])
    worth = torch.cat([row[1:] for row in steps])
    best = worth.sort(descending=True, stable=True).indices[: total - len(steps)]
    return (1 + torch.bincount(heads[best], minlength=len(steps))).tolist()
