"""From a ratio to a whole number of channels, and how far that is from what the ratio says."""

import math
from fractions import Fraction

from flame.errors import UserError
from pruning.planning.per_kind import check_ratio
from pruning.spaces import HEAD_KINDS, NOUNS, Kind

LARGEST_MULTIPLE = 16
"""Widths of large heads are multiples of this unless asked otherwise: kernels work in tiles."""

STEPS = 8
"""Widths that a head has at least to choose from, its own among them, unless asked otherwise."""

FAR = Fraction(5, 100)
"""A width that misses the one asked for by a larger part of it is pointed out."""


def default_multiple(head_dim: int) -> int:
    """Largest power of two, at most `LARGEST_MULTIPLE`, that `STEPS` times fits into `head_dim`."""
    return min(LARGEST_MULTIPLE, 1 << (max(head_dim // STEPS, 1).bit_length() - 1))


def wanted_width(head_dim: int, ratio: float) -> Fraction:
    """The exact head_dim (1 - ratio), with the ratio as the decimal number that was written."""
    return head_dim * (1 - Fraction(repr(float(ratio))))


def width(
    head_dim: int, ratio: float, multiple_of: int | None = None, noun: str = "channels"
) -> int:
    """Channels to keep: floor(head_dim (1 - ratio)), down to a multiple, at least one multiple.

    The ratio counts as the decimal number that was written, so 0.9 of 10 keeps 1 and not 0.
    `multiple_of=1` is the rule of arXiv 2602.04852, but for its zero.

    Args:
        head_dim: channels per head.
        ratio: the part to remove, above 0 and below 1.
        multiple_of: the kept width is a multiple of this; by default of `default_multiple`.
        noun: the channels in words, for messages.

    Raises:
        UserError: the ratio or multiple is out of range, or the width would not change.
    """
    check_ratio(ratio)
    if multiple_of is None:
        multiple_of = default_multiple(head_dim)
    if multiple_of < 1:
        raise UserError(f"cannot round widths down to a multiple of {multiple_of}: give 1 or more")
    target = math.floor(wanted_width(head_dim, ratio))
    kept = max(target // multiple_of, 1) * multiple_of
    if kept >= head_dim:
        hint = f"choose another ratio, or a multiple below {head_dim} (--multiple-of 1 or --paper)"
        rule = f"which in multiples of {multiple_of} (at least one) is no reduction: {hint}"
        if multiple_of == 1:
            rule = "of which one stays, so there is no reduction: choose another ratio or space"
        raise UserError(f"ratio {ratio} leaves {target} of {head_dim} {noun}, {rule}")
    return kept


def check_width(wanted: int, size: int, multiple_of: int, kind: Kind) -> None:
    """Raise UserError unless `wanted` of `size` is a reduction and a multiple of `multiple_of`."""
    if not 1 <= wanted < size:
        what = "is no reduction" if wanted == size else "is out of range"
        raise UserError(
            f"--width {kind}={wanted} {what}: a model with {size} {NOUNS[kind]} can keep 1 to "
            f"{size - 1}"
        )
    if kind not in HEAD_KINDS and wanted % multiple_of:
        below = wanted // multiple_of * multiple_of
        near = f"{below} or {below + multiple_of}" if below else str(multiple_of)
        raise UserError(
            f"--width {kind}={wanted} is not a multiple of {multiple_of}: take {near}, or "
            "--multiple-of 1"
        )


def departure(kind: Kind, size: int, ratio: float, kept: int, multiple_of: int) -> str | None:
    """Say in one line that `kept` of `size` is far from what `ratio` asks for, with the way out.

    None if it misses the width asked for by at most `FAR`, or is the whole number of channels
    just below it.
    """
    wanted = wanted_width(size, ratio)
    missed = abs(kept - wanted)
    if missed <= FAR * wanted or (kind not in HEAD_KINDS and multiple_of == 1 and missed < 1):
        return None
    whole = max(math.floor(wanted), 1)
    if kind in HEAD_KINDS:
        near = sorted({max(whole, 1), min(whole + 1, size - 1)})
        exact = " or ".join(f"{float(1 - Fraction(n, size)):.4g} ({n})" for n in reversed(near))
        why = f"heads go whole, so give a ratio that is near one of {exact}"
    else:
        why = f"widths are multiples of {multiple_of}; --multiple-of 1 keeps {whole}"
    removed = float(100 * (1 - Fraction(kept, size)))
    return (
        f"--ratio {ratio:g} keeps {kept} of {size} {NOUNS[kind]}, which removes {removed:.3g} % "
        f"and not {100 * ratio:.3g} %: {why}"
    )
