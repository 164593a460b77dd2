"""Budgets: how much of what to remove, and how that becomes a number of kept channels.

A budget is one of three: a part to remove (`ratio`), a width to keep, or the bytes that the
recurrent state may take. Ratio and width may differ between kinds of spaces. What a space keeps is
a multiple of `multiple_of`; numbers of heads need not be.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

from flame.errors import UserError, first_line
from flame.options import option
from pruning.adapters.interface import Adapter, Config
from pruning.planning.per_kind import (
    PerKind,
    as_text,
    check_ratio,
    for_kinds,
    parse_per_kind,
    parse_ratio,
    parse_width,
)
from pruning.spaces import KINDS, NOUNS, Kind, Space

MULTIPLE_OF = 16
"""Widths are multiples of this unless asked otherwise: kernels work in tiles."""

PAD_HELP = "where heads differ, write a stock model, filled up with zeros to the largest width"

Allocate = Literal["uniform", "layer", "model"]


@dataclass(frozen=True)
class Budget:
    """How much of what to remove. Exactly one of ratio, width and state_bytes is given.

    Ratio and width are one number for all kinds of `space`, or one for each. The fields are
    options of the command line too.
    """

    ratio: float | PerKind | None = option(
        None,
        "part of the channels to remove, such as 0.5 or key=0.5,head=0.25",
        parse=lambda text: parse_per_kind(text, parse_ratio),
    )
    width: int | PerKind | None = option(
        None,
        "channels a head to keep, such as 64 or key=64,value=32",
        parse=lambda text: parse_per_kind(text, parse_width),
    )
    state_bytes: int | None = option(
        None,
        "most bytes of a sequence's recurrent state, over all layers, in float32",
        least=1,
        metavar="N",
    )
    space: str = option("key", "what to prune: key, value (channels) or head", metavar="KIND,KIND")
    allocate: Allocate = option(
        "uniform",
        "share the channels by the method's scores between the heads of a layer or of the model",
    )
    pad: bool = option(False, PAD_HELP)
    multiple_of: int | None = option(
        None,
        f"kept widths, but not numbers of heads, are multiples of this (default: {MULTIPLE_OF})",
        least=1,
        metavar="N",
    )
    paper: bool = option(False, "as published: --multiple-of 1, and the method's own settings")

    @property
    def multiple(self) -> int:
        """What kept widths are multiples of; raises UserError if `paper` contradicts it."""
        if self.paper and self.multiple_of not in (None, 1):
            raise UserError(f"--paper means --multiple-of 1, not {self.multiple_of}: leave one out")
        return self.multiple_of or (1 if self.paper else MULTIPLE_OF)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds that `space` names; UserError for an unknown or repeated name."""
        names = [name.strip() for name in self.space.split(",")]
        for name in names:
            if name not in KINDS:
                raise UserError(f"unknown kind of space {name!r}: choose from {', '.join(KINDS)}")
        if len(set(names)) < len(names):
            raise UserError(f"--space {self.space} names a kind twice")
        return tuple(kind for kind in KINDS if kind in names)

    def record(self) -> dict[str, Any]:
        """What a plan records of the budget: what was asked for, as on the command line."""
        found = {
            "ratio": as_text(self.ratio),
            "width": as_text(self.width),
            "state_bytes": self.state_bytes,
            "space": ",".join(self.kinds),
            "multiple_of": self.multiple,
            "allocate": self.allocate if self.allocate != "uniform" else None,
        }
        return {name: value for name, value in found.items() if value is not None}


def uniform_widths(
    budget: Budget, adapter: Adapter, config: Config, spaces: Iterable[Space]
) -> dict[Kind, int]:
    """What every space of a kind keeps in each head, before anything is shared out by scores.

    Args:
        budget: what to remove.
        adapter: of the model's family.
        config: the model's.
        spaces: those of the budget's kinds.

    Raises:
        UserError: a width would not change, or no width satisfies the budget.
    """
    sizes = {space.kind: space.head_dim for space in spaces}
    given = (budget.ratio, budget.width, budget.state_bytes)
    if sum(value is not None for value in given) != 1:
        raise UserError("give exactly one of --ratio, --width and --state-bytes")
    if budget.ratio is not None:
        ratios = for_kinds(budget.ratio, sizes, "--ratio")
        multiples = {kind: 1 if kind == "head" else budget.multiple for kind in sizes}
        return {
            kind: width(size, ratios[kind], multiples[kind], NOUNS[kind])
            for kind, size in sizes.items()
        }
    if budget.width is not None:
        wanted = for_kinds(budget.width, sizes, "--width")
        for kind, size in sizes.items():
            _check_width(wanted[kind], size, budget.multiple, kind)
        return wanted
    return _widths_of_bytes(budget, adapter, config, list(spaces))


def width(
    head_dim: int, ratio: float, multiple_of: int = MULTIPLE_OF, noun: str = "channels"
) -> int:
    """Channels to keep: floor(head_dim (1 - ratio)), down to a multiple, at least one multiple.

    The ratio counts as the decimal number that was written, so 0.9 of 10 keeps 1 and not 0.
    `multiple_of=1` is the rule of arXiv 2602.04852, but for its zero.

    Args:
        head_dim: channels per head.
        ratio: the part to remove, above 0 and below 1.
        multiple_of: the kept width is a multiple of this.
        noun: the channels in words, for messages.

    Raises:
        UserError: the ratio or multiple is out of range, or the width would not change.
    """
    check_ratio(ratio)
    if multiple_of < 1:
        raise UserError(f"cannot round widths down to a multiple of {multiple_of}: give 1 or more")
    target = math.floor(head_dim * (1 - Fraction(repr(float(ratio)))))
    kept = max(target // multiple_of, 1) * multiple_of
    if kept >= head_dim:
        hint = f"choose another ratio, or a multiple below {head_dim} (--multiple-of 1 or --paper)"
        rule = f"which in multiples of {multiple_of} (at least one) is no reduction: {hint}"
        if multiple_of == 1:
            rule = "of which one stays, so there is no reduction: choose another ratio or space"
        raise UserError(f"ratio {ratio} leaves {target} of {head_dim} {noun}, {rule}")
    return kept


def kept_heads(budget: Budget, heads: int) -> int:
    """How many of `heads` heads, those of all layers, the ratio of `budget` leaves."""
    ratio = for_kinds(budget.ratio, dict.fromkeys(budget.kinds, heads), "--ratio")["head"]
    return width(heads, ratio, 1, NOUNS["head"])


def _check_width(wanted: int, size: int, multiple_of: int, kind: Kind) -> None:
    if not 1 <= wanted < size:
        what = "is no reduction" if wanted == size else "is out of range"
        raise UserError(
            f"--width {kind}={wanted} {what}: a model with {size} {NOUNS[kind]} can keep 1 to "
            f"{size - 1}"
        )
    if kind != "head" and wanted % multiple_of:
        below = wanted // multiple_of * multiple_of
        near = f"{below} or {below + multiple_of}" if below else str(multiple_of)
        raise UserError(
            f"--width {kind}={wanted} is not a multiple of {multiple_of}: take {near}, or "
            "--multiple-of 1"
        )


def _widths_of_bytes(
    budget: Budget, adapter: Adapter, config: Config, spaces: list[Space]
) -> dict[Kind, int]:
    """The largest width of the one kind with which the state fits into the bytes."""
    limit = budget.state_bytes
    assert limit is not None
    if len(budget.kinds) != 1:
        raise UserError(
            f"--state-bytes sets the width of one kind, not of {budget.space}: choose one, or give "
            "--width or --ratio"
        )
    (kind,) = budget.kinds
    step = 1 if kind == "head" else budget.multiple
    size, dense = spaces[0].head_dim, adapter.state_bytes(config)
    if dense <= limit:
        raise UserError(f"--state-bytes {limit}: the state takes {dense} already, nothing to prune")
    for kept in range((size - 1) // step * step, 0, -step):
        if _state_bytes(adapter, config, spaces, kept) <= limit:
            return {kind: kept}
    if step >= size:
        raise UserError(
            f"no multiple of {step} is below the {size} {NOUNS[kind]}: give a smaller --multiple-of"
        )
    least = _state_bytes(adapter, config, spaces, step)
    raise UserError(
        f"--state-bytes {limit} is too little: {step} of {size} {NOUNS[kind]}, the fewest in "
        f"multiples of {step}, take {least} (all take {dense})"
    )


def _state_bytes(adapter: Adapter, config: Config, spaces: list[Space], kept: int) -> int:
    widths = {space.name: (kept,) * space.num_heads for space in spaces}
    try:
        return adapter.state_bytes(adapter.resize(config, widths))
    except ValueError as error:
        raise UserError(f"{adapter.model_type} cannot have {kept}: {first_line(error)}") from error
