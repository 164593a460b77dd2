"""Which methods can choose in which spaces; asked before any work."""

from collections.abc import Iterable

from pruning.methods import METHODS, Method
from pruning.spaces import Kind, Space

MIXABLE = ("projection", "convolution")
"""Roles of tensors whose channels a projection can mix: the others act on each by itself."""


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
