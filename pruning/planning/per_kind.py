"""Numbers that may differ between kinds of spaces, as the command line writes them.

`0.5` stands for all kinds that are pruned, `key=0.5,head=0.25` for each of them.
"""

from collections.abc import Callable, Mapping
from typing import Any

from flame.errors import UserError
from pruning.spaces import KINDS, Kind

PerKind = Mapping[Kind, Any]
"""A number for each kind of space."""


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


def parse_width(text: str) -> int:
    """The width that `text` writes; raises UserError if it is no whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"width {text!r} is not a whole number of at least 1")
    return int(text)


def parse_per_kind(text: str, parse: Callable[[str], Any]) -> Any:
    """What `text` writes: one number, or one for each kind, such as `key=0.5,head=0.25`."""
    if "=" not in text:
        return parse(text)
    found: dict[Kind, Any] = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        if name not in KINDS:
            raise UserError(
                f"{part!r} of {text!r} is for no kind of space: write "
                f"{'=…, '.join(KINDS[:-1])}=… or {KINDS[-1]}=…"
            )
        if name in found:
            raise UserError(f"{text!r} says {name} twice")
        found[name] = parse(value)
    return found


def for_kinds(given: Any, sizes: Mapping[Kind, int], flag: str) -> dict[Kind, Any]:
    """The number of each kind in `sizes`, the kinds that are pruned.

    Raises:
        UserError: `given` has another kind, or lacks one; `flag` is the option that gave it.
    """
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


def as_text(value: Any) -> Any:
    """A number as it is, and numbers of several kinds as the command line writes them."""
    if not isinstance(value, Mapping):
        return value
    return ",".join(f"{kind}={value[kind]}" for kind in KINDS if kind in value)
