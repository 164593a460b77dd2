"""Budgets: how much of what to remove, and how that becomes a number of kept channels.

A budget is one of three: a part to remove (`ratio`), a width to keep, or the bytes that the
recurrent state may take. Ratio and width may differ between kinds of spaces. What a space keeps is
a multiple of `multiple_of`; numbers of heads need not be.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from flame.errors import UserError
from flame.options import option
from pruning.adapters.interface import Adapter, Config
from pruning.planning.per_kind import (
    PerKind,
    as_text,
    for_kinds,
    parse_per_kind,
    parse_ratio,
    parse_width,
)
from pruning.planning.rounding import check_width, default_multiple, departure, width
from pruning.planning.state_width import width_of_bytes
from pruning.serving.contract import ENGINES
from pruning.spaces import HEAD_KINDS, KINDS, NOUNS, Kind, Space

PAD_HELP = "where heads differ, write a stock model, filled up with zeros to the largest width"

Allocate = Literal["uniform", "layer", "model", "auto"]

Gain = Literal["undo", "keep", "measured"]

SQUARE = "square"  # key and value channels of one width


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
    space: str | None = option(
        None,
        "what to prune: key, value, head, value-head, or square (default: key; with --for any)",
        metavar="KIND,KIND",
    )
    for_: tuple[str, ...] = option(
        (),
        f"engines that are to serve the result, for its widths: {', '.join(ENGINES)}",
        metavar="NAME,NAME",
        choices=tuple(ENGINES),
    )
    allocate: Allocate = option(
        "uniform",
        "share the channels by the method's scores between the heads of a layer or of the model; "
        "auto measures these, uniform widths, and shares in one unit, and takes the least harmful",
    )
    floor: int | None = option(
        None,
        "channels that --allocate leaves every head at least (default: one multiple)",
        least=1,
        metavar="N",
    )
    pad: bool = option(False, PAD_HELP)
    multiple_of: int | None = option(
        None,
        "kept widths, but not numbers of heads, are multiples of this (default: an eighth of the "
        "head as a power of two, at most 16)",
        least=1,
        metavar="N",
    )
    strict_ratio: bool = option(
        False, "refuse a width that misses what --ratio asks for by more than 5 %"
    )
    paper: bool = option(
        False, "as published: --multiple-of 1, the method's own settings, outputs left to grow"
    )
    gain: Gain | None = option(
        None,
        "what becomes of the gain of fewer channels: undone, kept as published, or by what its "
        "model predicts on held-out text (default: keep with --paper; measured in prune and shrink "
        "where no --method is given; else undo)",
    )
    fitted: str = ""
    """What became of a budget for engines or for a square (`pruning.planning.fitting`)."""

    @property
    def asked_multiple(self) -> int | None:
        """What kept widths are multiples of, if asked for.

        Raises:
            UserError: `paper` and `multiple_of` or `gain` contradict each other.
        """
        if self.paper and self.multiple_of not in (None, 1):
            raise UserError(f"--paper means --multiple-of 1, not {self.multiple_of}: leave one out")
        if self.paper and self.gain not in (None, "keep"):
            raise UserError(f"--paper means --gain keep, not {self.gain}: leave one out")
        return 1 if self.paper else self.multiple_of

    @property
    def keeps_gain(self) -> bool:
        """Whether outputs are left to grow; not if that is still to be measured."""
        return self.paper or self.gain == "keep"

    def multiple(self, kind: Kind, size: int) -> int:
        """What the kept width of a space of `kind` with `size` channels or heads is a multiple of.

        Raises:
            UserError: `paper` and `multiple_of` contradict each other.
        """
        asked = self.asked_multiple
        return 1 if kind in HEAD_KINDS else default_multiple(size) if asked is None else asked

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds that `space` names; UserError for an unknown or repeated name."""
        if self.space == SQUARE:
            return ("key", "value")
        names = [name.strip() for name in ("key" if self.space is None else self.space).split(",")]
        for name in names:
            if name not in KINDS:
                known = f"{', '.join(KINDS)}, or {SQUARE} alone"
                raise UserError(f"unknown kind of space {name!r}: choose from {known}")
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
            "multiple_of": self.asked_multiple,
            "allocate": self.allocate if self.allocate != "uniform" else None,
            "floor": self.floor,
            "gain": self.gain,
            "for": ",".join(self.for_) or None,
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
    spaces = list(spaces)
    sizes = {space.kind: space.head_dim for space in spaces}
    if (budget.ratio, budget.width, budget.state_bytes).count(None) != 2:
        raise UserError("give exactly one of --ratio, --width and --state-bytes")
    if budget.ratio is not None:
        ratios = for_kinds(budget.ratio, sizes, "--ratio")
        return {
            kind: width(size, ratios[kind], budget.multiple(kind, size), NOUNS[kind])
            for kind, size in sizes.items()
        }
    if budget.width is not None:
        wanted = for_kinds(budget.width, sizes, "--width")
        for kind, size in sizes.items():
            check_width(wanted[kind], size, budget.multiple(kind, size), kind)
        return wanted
    assert budget.state_bytes is not None
    if len(budget.kinds) != 1:
        raise UserError(
            f"--state-bytes sets the width of one kind, not of {budget.space}: choose one, or give "
            "--width or --ratio"
        )
    (kind,) = budget.kinds
    step = budget.multiple(kind, sizes[kind])
    return {kind: width_of_bytes(budget.state_bytes, step, adapter, config, spaces)}


def departures(
    budget: Budget, spaces: Iterable[Space], widths: Mapping[Kind, int]
) -> Iterator[str]:
    """Yield a line for each kind whose width is far from what the ratio of `budget` asks for.

    Args:
        budget: what to remove; one without a ratio has no such line.
        spaces: those of the budget's kinds.
        widths: what `uniform_widths` gave.
    """
    found = list(spaces)
    sizes = {space.kind: space.head_dim for space in found}
    if budget.ratio is None:
        return
    for kind, ratio in for_kinds(budget.ratio, sizes, "--ratio").items():
        size, kept = sizes[kind], widths[kind]
        if kind == "head" and budget.allocate == "model":
            size = sum(space.head_dim for space in found if space.kind == "head")
            kept = kept_heads(budget, size)
        line = departure(kind, size, ratio, kept, budget.multiple(kind, size))
        if line is not None:
            yield line


def kept_heads(budget: Budget, heads: int) -> int:
    """How many of `heads` heads, those of all layers, the ratio of `budget` leaves."""
    ratio = for_kinds(budget.ratio, dict.fromkeys(budget.kinds, heads), "--ratio")["head"]
    return width(heads, ratio, 1, NOUNS["head"])
