"""Matching a stranger's regular expressions against module names, in bounded time.

peft's `rank_pattern` and `alpha_pattern` are expressions from a file. Some of them, such as
`(a+)+b`, take longer than the age of the universe to fail on a name of fifty letters.
"""

import re
import time
from collections.abc import Iterable

from flame.errors import UserError, first_line

LONGEST = 1000
"""Characters that an expression may have."""

PATIENCE = 2.0
"""Seconds that all matches of one `Patterns` may take together."""

_PLAIN = re.compile(r"[\w.-]+")


class Patterns:
    """The keys of a `rank_pattern` or `alpha_pattern`.

    Args:
        keys: peft's expressions, each for the end of a module's name.
        origin: what to name in an error, such as `adapter_config.json: rank_pattern`.

    Raises:
        UserError: an expression is too long or not understood.
    """

    def __init__(self, keys: Iterable[str], origin: str) -> None:
        self._origin, self._left = origin, PATIENCE
        self._compiled = {key: self._compile(key) for key in keys}

    def first_match(self, module: str) -> str | None:
        """Return the first key that peft would find to match the name `module`, None if none does.

        Raises `UserError` if the matches take too long.
        """
        for key, expression in self._compiled.items():
            if _PLAIN.fullmatch(key) and not _ends_like(module, key):
                continue
            begin = time.monotonic()
            try:
                found = expression.match(module, timeout=max(self._left, 0.01))
            except TimeoutError as error:
                raise UserError(
                    f"{self._origin} has {_shown(key)}, an expression that takes for ever to "
                    f"match: write the names of the modules in its place"
                ) from error
            self._left -= time.monotonic() - begin
            if found:
                return key
        return None

    def _compile(self, key: str) -> "regex.Pattern":  # type: ignore[name-defined]  # noqa: F821
        import regex

        if len(key) > LONGEST:
            raise UserError(f"{self._origin} has an expression of {len(key)} characters")
        try:
            # The expression is peft's own around a key.
            return regex.compile(rf"(.*\.)?({key})$")
        except (regex.error, OverflowError, RecursionError) as error:
            raise UserError(f"{self._origin} has {_shown(key)}: {first_line(error)}") from error


def _ends_like(module: str, key: str) -> bool:
    """Return whether a name ends in `key`, whose dots stand for any character."""
    tail = module[-len(key) :]
    return len(tail) == len(key) and all(k in (".", t) for k, t in zip(key, tail, strict=True))


def _shown(key: str) -> str:
    return repr(key if len(key) <= 60 else key[:57] + "...")
