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

Scores = Mapping[str, Float64[Tensor, "H d"]]
"""Scores of spaces that share one total, by name; larger for what matters more."""


def shared_widths(
    scores: Scores, total: int, multiple: int, floor: int = 1
) -> dict[str, tuple[int, ...]]:
    """Kept channels of each head of each space, `total` of them together.

    Ties go to the earlier space, head and step.

    Args:
        scores: of the spaces that share one total.
        total: channels of all heads together, a multiple of `multiple`.
        multiple: all widths are multiples of this.
        floor: channels that every head keeps at least, rounded up to a multiple; `total` is
            enough for it.

    Raises:
        ValueError: a score is NaN or infinite.
    """
    for name, of_space in scores.items():
        if not bool(of_space.isfinite().all()):
            raise ValueError(f"{name}: the scores hold a NaN or an infinity")
    steps = [_steps(row, multiple) for of_space in scores.values() for row in of_space.cpu()]
    counts = _counts(steps, total // multiple, max(-(-floor // multiple), 1))
    widths = iter(count * multiple for count in counts)
    return {name: tuple(next(widths) for _ in of_space) for name, of_space in scores.items()}


def in_units_of_loss(
    scores: Scores, width: int, damage: Mapping[str, float]
) -> dict[str, Float64[Tensor, "H d"]]:
    """The scores, each space's times one factor: what its dropped channels cost is then `damage`.

    So scores whose units differ between spaces, or whose errors the rest of the model takes
    differently, can share one total.

    Args:
        scores: at least 0.
        width: channels that every head keeps where the damage was measured; the others are those
            with the smallest scores, or nearly, where a method chooses sets.
        damage: measured for each space with only its own channels dropped.
    """
    found = {}
    for name, of_space in scores.items():
        ordered = of_space.sort(descending=True).values
        dropped = float(ordered[:, width:].sum())
        found[name] = of_space * (damage[name] / dropped if dropped > 0 else 0.0)
    return found


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


def _counts(steps: Sequence[Tensor], total: int, first: int) -> list[int]:
    """Steps of each head: its first ones, and the best of all others."""
    heads = torch.cat([torch.full((len(row) - first,), head) for head, row in enumerate(steps)])
    worth = torch.cat([row[first:] for row in steps])
    best = worth.sort(descending=True, stable=True).indices[: total - first * len(steps)]
    return (first + torch.bincount(heads[best], minlength=len(steps))).tolist()
