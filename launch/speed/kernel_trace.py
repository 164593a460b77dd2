"""Which operators ran: those of `kernels/`, in plain PyTorch, or kernels that Triton compiled."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

OPERATORS = Path(__file__).resolve().parents[2] / "kernels"
TRITON = "triton: "
"""What the names of compiled kernels start with."""


def operators_of(action: Callable[[], object]) -> list[str]:
    """Names of the operators that `action` calls, in order of their first call.

    `gated_delta_rule.chunk_gated_delta_rule` is a function of ours, `triton: NAME` a compiled
    kernel. Found by watching the calls of this thread, not by asking which should run; what
    autograd runs in a thread of its own is not seen.
    """
    found: dict[str, None] = {}
    launch = _triton_launch()

    def watch(frame: FrameType, event: str, _: Any) -> None:
        if event != "call":
            return
        if frame.f_code is launch:
            found.setdefault(TRITON + str(getattr(frame.f_locals["self"], "__name__", "?")))
        elif (operator := _own_operator(frame)) is not None:
            found.setdefault(operator)

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        action()
    finally:
        sys.setprofile(before)
    return list(found)


def _own_operator(frame: FrameType) -> str | None:
    """The name of a function of `kernels/` that code from elsewhere calls."""
    caller = frame.f_back
    if not _is_own(frame.f_code) or (caller is not None and _is_own(caller.f_code)):
        return None
    return f"{_folder(frame.f_code)}.{frame.f_code.co_name}"


def _is_own(code: CodeType) -> bool:
    return code.co_filename.startswith(f"{OPERATORS}/") and _folder(code) != ""


def _folder(code: CodeType) -> str:
    """The operator's folder; empty for files of `kernels/` itself, which only register."""
    inside = Path(code.co_filename).relative_to(OPERATORS).parts
    return inside[0] if len(inside) > 1 else ""


def _triton_launch() -> CodeType | None:
    """The code that every launch of a compiled kernel runs through."""
    try:
        from triton.runtime.jit import JITFunction
    except ImportError:
        return None
    return getattr(JITFunction.run, "__code__", None)
