"""Budgets: how much of what to remove, and how that becomes a number of kept channels.

A budget is one of three: a part to remove (`ratio`), a width to keep, or the bytes that the
recurrent state may take. Ratio and width may differ between kinds of spaces. What a space keeps is
a multiple of `multiple_of`, which heads have no use for.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

from flame.errors import UserError, first_line
from flame.models.widths import KERNEL_WIDTHS
from flame.options import option
from pruning.adapters.interface import Adapter, Config
from pruning.spaces import KINDS, Kind, Space

MULTIPLE_OF = 16
"""Widths are multiples of this unless asked otherwise: kernels work in tiles."""

PAD_HELP = "where heads differ, write a stock model, filled up with zeros to the largest width"

Allocate = Literal["uniform", "layer", "model"]

PerKind = Mapping[Kind, Any]
"""A number for each kind of space."""


def parse_ratio(text: str) -> float:
    """The ratio that `text` writes; raises UserError if it is not a number between 0 and 1."""
    try:
        ratio = float(text)
    except ValueError as error:
        raise UserError(f"ratio {text!r} is not a number: give one between 0 and 1") from error
    check_ratio(ratio)
    return ratio


def parse_width(text: str) -> int:
    """The width that `text` writes; raises UserError if it is no whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"width {text!r} is not a whole number of at least 1")
    return int(text)


def parse_per_kind(text: str, parse: Callable[[str], Any]) -> Any:
    """One number for all kinds of spaces, or one for each, such as `key=0.5,head=0.25`."""
    if "=" not in text:
        return parse(text)
    found: dict[Kind, Any] = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        if name not in KINDS:
            raise UserError(
                f"{part!r} of {text!r} is for no kind of space: write key=…, value=… or head=…"
            )
        if name in found:
            raise UserError(f"{text!r} says {name} twice")
        found[name] = parse(value)
    return found


def _written(value: Any) -> Any:
    """A number for each kind as the command line has it; another value as it is."""
    if not isinstance(value, Mapping):
        return value
    return ",".join(f"{kind}={value[kind]}" for kind in KINDS if kind in value)


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
        write=lambda value: str(_written(value)),
    )
    width: int | PerKind | None = option(
        None,
        "channels a head to keep, such as 64 or key=64,value=32",
        parse=lambda text: parse_per_kind(text, parse_width),
        write=lambda value: str(_written(value)),
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
        """The kinds of `space`; UserError for what is none, or none at all."""
        names = [name.strip() for name in self.space.split(",")]
        for name in names:
            if name not in KINDS:
                raise UserError(f"unknown kind of space {name!r}: choose from {', '.join(KINDS)}")
        if len(set(names)) < len(names):
            raise UserError(f"--space {self.space} names a kind twice")
        return tuple(kind for kind in KINDS if kind in names)

    def record(self) -> dict[str, Any]:
        """What a plan says of it: what was asked for, as on the command line."""
        found = {
            "ratio": _written(self.ratio),
            "width": _written(self.width),
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
        UserError: the budget is none, a width would not change, or no width satisfies it.
    """
    sizes = {space.kind: space.head_dim for space in spaces}
    given = [budget.ratio, budget.width, budget.state_bytes]
    if sum(value is not None for value in given) != 1:
        raise UserError("give exactly one of --ratio, --width and --state-bytes")
    if budget.ratio is not None:
        ratios = _of_kinds(budget.ratio, sizes, "--ratio")
        multiples = {kind: 1 if kind == "head" else budget.multiple for kind in sizes}
        return {
            kind: width(size, ratios[kind], multiples[kind], _noun(kind))
            for kind, size in sizes.items()
        }
    if budget.width is not None:
        wanted = _of_kinds(budget.width, sizes, "--width")
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
    ratio = _of_kinds(budget.ratio, dict.fromkeys(budget.kinds, heads), "--ratio")["head"]
    return width(heads, ratio, 1, _noun("head"))


def check_ratio(ratio: float) -> None:
    """Raise UserError unless 0 < ratio < 1; NaN is refused."""
    if not 0 < ratio < 1:
        raise UserError(
            f"ratio {ratio} is not between 0 and 1: it is the part of the channels to remove, "
            f"such as 0.5"
        )


def kernel_warning(width: int) -> str | None:
    """One sentence if fla's CUDA kernels do not take this key width, else None."""
    if width in KERNEL_WIDTHS:
        return None
    return (
        f"fla's CUDA kernels take {KERNEL_WIDTHS.start} to {KERNEL_WIDTHS.stop - 1} key channels "
        f"per head, not {width}: the model will run on a CPU only"
    )


def _of_kinds(given: Any, sizes: Mapping[Kind, int], flag: str) -> dict[Kind, Any]:
    """`given` for each kind that is pruned."""
    if not isinstance(given, Mapping):
        return dict.fromkeys(sizes, given)
    for kind in given:
        if kind not in sizes:
            raise UserError(
                f"{flag} {kind}={given[kind]} is for a kind that is not pruned: --space is "
                f"{','.join(sizes)}"
            )
    for kind in sizes:
        if kind not in given:
            raise UserError(f"{flag} says nothing of {kind}, which --space names: add {kind}=…")
    return dict(given)


def _check_width(wanted: int, size: int, multiple_of: int, kind: Kind) -> None:
    if not 1 <= wanted < size:
        what = "is no reduction" if wanted == size else "is out of range"
        raise UserError(
            f"--width {kind}={wanted} {what}: a model with {size} {_noun(kind)} can keep 1 to "
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
    """The largest width whose state fits."""
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
            f"no multiple of {step} is below the {size} {_noun(kind)}: give a smaller --multiple-of"
        )
    least = _state_bytes(adapter, config, spaces, step)
    raise UserError(
        f"--state-bytes {limit} is too little: {step} of {size} {_noun(kind)}, the fewest in "
        f"multiples of {step}, take {least} (all take {dense})"
    )


def _state_bytes(adapter: Adapter, config: Config, spaces: list[Space], kept: int) -> int:
    widths = {space.name: (kept,) * space.num_heads for space in spaces}
    try:
        return adapter.state_bytes(adapter.resize(config, widths))
    except ValueError as error:
        raise UserError(f"{adapter.model_type} cannot have {kept}: {first_line(error)}") from error


def _noun(kind: Kind) -> str:
    return "heads" if kind == "head" else f"{kind} channels"
