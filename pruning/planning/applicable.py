"""Which methods can choose in which spaces; asked before any work."""

from collections.abc import Iterable, Mapping

from flame.errors import UserError
from pruning.methods import METHODS, Method
from pruning.planning.budgets import Budget
from pruning.spaces import NOUNS, Kind, Space

MIXABLE = ("projection", "convolution")
"""Roles of tensors whose channels a projection can mix: the others act on each by itself."""


def check_method(budget: Budget, method: Method, spaces: Iterable[Space]) -> None:
    """Raise UserError, with the way out, if `method` cannot do what `budget` asks for in spaces."""
    spaces = list(spaces)
    for kind in budget.kinds:
        reason = why_not(method, kind, spaces)
        if reason is not None:
            raise UserError(reason)
    if budget.allocate == "uniform":
        return
    if "value-head" in budget.kinds:
        raise UserError(
            f"--allocate {budget.allocate} gives heads numbers of their own, and every key head of "
            "a model serves as many value heads: use --allocate uniform with --space value-head"
        )
    if not hasattr(method, "scores"):
        able = ", ".join(name for name, other in METHODS.items() if hasattr(other, "scores"))
        raise UserError(
            f"--allocate {budget.allocate} shares channels by scores, which {method.name} has "
            f"none of: use --allocate uniform, or one of {able}"
        )
    if budget.allocate == "auto":
        _check_measurable(budget, method)
    if budget.pad and hasattr(method, "new_tensors"):
        raise UserError(
            f"--pad keeps channels where they are, and {method.name} mixes them: leave it out"
        )
    single = [kind for kind in budget.kinds if kind != "key"]
    if budget.allocate == "layer" and single:
        raise UserError(
            f"--allocate layer shares channels between the heads of a layer, which have one "
            f"selection of kind {single[0]!r}: use --allocate model"
        )


def check_floor(budget: Budget, widths: Mapping[Kind, int]) -> None:
    """Raise UserError if `budget` has a floor that nothing can fall to, or that is out of reach."""
    if budget.floor is None:
        return
    if budget.allocate == "uniform":
        raise UserError(
            "--floor is for heads of different widths, which --allocate layer, model or auto "
            "makes: leave it out, or say --allocate"
        )
    for kind, width in widths.items():
        if kind != "head" and budget.floor > width:
            raise UserError(
                f"--floor {budget.floor} is more than the {width} {NOUNS[kind]} a head that the "
                f"budget leaves: give at most {width}"
            )


def _check_measurable(budget: Budget, method: Method) -> None:
    """Raise UserError if zeros in a dense model do not show what the pruned one will do."""
    if budget.keeps_gain:
        word = "--paper" if budget.paper else "--gain keep"
        raise UserError(
            f"--allocate auto measures models whose gain is undone, and {word} leaves it: leave "
            "one out"
        )
    if hasattr(method, "new_tensors"):
        raise UserError(
            f"--allocate auto measures dense models with zeros in channels, and {method.name} "
            "mixes channels: use --allocate model"
        )


def why_not(method: type[Method] | Method, kind: Kind, spaces: Iterable[Space]) -> str | None:
    """Why `method` cannot choose among `spaces` of this kind, with what can; None if it can."""
    spaces = list(spaces)
    if kind not in method.kinds:
        return (
            f"{method.name} does not choose among spaces of kind {kind!r}, only "
            f"{', '.join(method.kinds)}: for {kind} take one of {_able(kind, spaces)}"
        )
    fixed = _fixed_tensor(method, kind, spaces)
    if fixed is not None:
        return (
            f"{method.name} mixes {kind} channels, and {fixed} acts on each of them by itself: "
            f"take one of {_able(kind, spaces)}"
        )
    return None


def methods_for(kind: Kind, spaces: Iterable[Space]) -> list[str]:
    """Names of the methods that can choose among `spaces` of this kind."""
    spaces = list(spaces)
    return [
        name
        for name, method in METHODS.items()
        if kind in method.kinds and _fixed_tensor(method, kind, spaces) is None
    ]


def _able(kind: Kind, spaces: Iterable[Space]) -> str:
    return ", ".join(methods_for(kind, spaces))


def _fixed_tensor(method: type[Method] | Method, kind: Kind, spaces: Iterable[Space]) -> str | None:
    """A tensor of the spaces whose channels `method` would mix and must not; None without any."""
    if not hasattr(method, "new_tensors"):
        return None
    axes = (axis for space in spaces if space.kind == kind for axis in space.axes)
    return next((axis.fqn for axis in axes if axis.role not in MIXABLE), None)
