"""Budgets: how a target ratio becomes a number of kept channels."""

import math
from collections.abc import Iterable
from fractions import Fraction

from flame.errors import UserError
from pruning.spaces import Space

MULTIPLE_OF = 16
"""Widths are multiples of this unless asked otherwise: kernels work in tiles."""

KERNEL_WIDTHS = range(16, 257)
"""Key widths that fla's CUDA kernels take."""


def width(head_dim: int, ratio: float, multiple_of: int = MULTIPLE_OF) -> int:
    """Channels to keep: floor(head_dim (1 - ratio)), down to a multiple, at least one multiple.

    The ratio counts as the decimal number that was written, so 0.9 of 10 keeps 1 and not 0.
    `multiple_of=1` is the rule of arXiv 2602.04852, but for its zero.

    Args:
        head_dim: channels per head.
        ratio: the part to remove, above 0 and below 1.
        multiple_of: the kept width is a multiple of this.

    Raises:
        UserError: the ratio or multiple is out of range, or the width would not change.
    """
    check_ratio(ratio)
    if multiple_of < 1:
        raise UserError(f"cannot round widths down to a multiple of {multiple_of}: give 1 or more")
    target = math.floor(head_dim * (1 - Fraction(repr(float(ratio)))))
    kept = max(target // multiple_of, 1) * multiple_of
    if kept >= head_dim:
        raise UserError(
            f"ratio {ratio} leaves {target} of {head_dim} channels, which in multiples of "
            f"{multiple_of} (at least one) is no reduction: choose another ratio, or a multiple "
            f"below {head_dim} (--multiple-of 1 or --paper for none)"
        )
    return kept


def check_ratio(ratio: float) -> None:
    """Raise UserError unless 0 < ratio < 1; NaN is refused."""
    if not 0 < ratio < 1:
        raise UserError(
            f"ratio {ratio} is not between 0 and 1: it is the part of the channels to remove, "
            f"such as 0.5"
        )


def parse_ratio(text: str) -> float:
    """The ratio that `text` writes; raises UserError if it is not a number between 0 and 1."""
    try:
        ratio = float(text)
    except ValueError as error:
        raise UserError(f"ratio {text!r} is not a number: give one between 0 and 1") from error
    check_ratio(ratio)
    return ratio


def uniform_widths(
    spaces: Iterable[Space], ratio: float, multiple_of: int = MULTIPLE_OF
) -> dict[str, int]:
    """The same rule for every space: kept channels per head, by space name."""
    return {space.name: width(space.head_dim, ratio, multiple_of) for space in spaces}


def kernel_warning(width: int) -> str | None:
    """One sentence if fla's CUDA kernels do not take this key width, else None."""
    if width in KERNEL_WIDTHS:
        return None
    return (
        f"fla's CUDA kernels take {KERNEL_WIDTHS.start} to {KERNEL_WIDTHS.stop - 1} key channels "
        f"per head, not {width}: the model will run on a CPU only"
    )
