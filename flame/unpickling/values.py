"""What a pickle may name or make here: factories in the place of classes, dtypes, shapes."""

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

MAX_DIMENSIONS = 16
_LARGEST = 2**63


class RefusedError(pickle.UnpicklingError):
    """The pickle is damaged, or is not what `pickle.dumps` makes of plain data."""


@dataclass(frozen=True, slots=True)
class Factory:
    """Stands for a class or function that a pickle names."""

    call: Callable[..., Any] | None = None
    """Makes a value of the arguments with which the pickle calls it; None if it may not."""
    new: Callable[[], Any] | None = None
    """Makes an empty object; None if the pickle may make none."""
    fill: Callable[[Any, Any], None] | None = None
    """Gives such an object its state; called once at most."""


def spelled(module: str, name: str) -> str:
    """Return the full name of a class or function, cut short, for a message."""
    return ascii(f"{module}.{name}")[1:-1][:80]


def find_dtype(module: str, name: str) -> torch.dtype | None:
    """Return the dtype that a pickle names as `torch.NAME`, or None if it names something else."""
    found = vars(torch).get(name) if module == "torch" else None
    return found if isinstance(found, torch.dtype) else None


def size_of(numbers: Any) -> torch.Size:
    """Return a shape of plain integers as a `torch.Size`; raise RefusedError for another value."""
    if type(numbers) is not tuple or len(numbers) > MAX_DIMENSIONS:
        raise RefusedError(f"a shape is no tuple of at most {MAX_DIMENSIONS} sizes")
    if not all(type(number) is int and 0 <= number < _LARGEST for number in numbers):
        raise RefusedError("a shape holds what is no size")
    return torch.Size(numbers)
