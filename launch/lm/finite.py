"""Whether what a model answers is a number."""

import math
from collections.abc import Iterable
from typing import Any

from flame.errors import UserError


class NotFiniteError(UserError):
    """A model's scores are not numbers."""


def check_finite(answers: Iterable[Any]) -> None:
    """Raise NotFiniteError if an answer, or the number that it begins with, is not finite."""
    values = (answer[0] if isinstance(answer, tuple) else answer for answer in answers)
    if any(isinstance(value, float) and not math.isfinite(value) for value in values):
        raise NotFiniteError(
            "the model gives logits that are not finite: try --dtype float32, "
            "on the CPU if the GPU's kernels refuse it"
        )
