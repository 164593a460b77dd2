"""Rows that are no document: skipped and counted, up to a limit."""

import logging
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from flame.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Unreadable:
    """Stands in the place of a row that its file's format could not give."""

    reason: str


@dataclass
class BadRows:
    """Turns the cells of a text column into documents, and counts those that are none.

    A bad row becomes an empty document, so that the others keep their numbers.
    """

    name: str
    """The set's name in messages."""

    text_key: str
    """The column that holds the text."""

    limit: int
    """How many bad rows are skipped."""

    bad: int = 0
    good: int = 0
    first: str = ""
    """Why the first bad row is none."""

    _seen: set[Hashable] = field(default_factory=set, repr=False)

    def text(self, cell: Any, place: Hashable = None) -> str:
        """Return a cell as a document; an empty one for a missing value or a bad row.

        Args:
            cell: what the file holds.
            place: where, so that a row counts once however many epochs read it; None counts it.

        Raises:
            UserError: the row is bad, and `limit` rows were before it.
        """
        reason = self._problem(cell)
        if reason is None:
            self.good += cell is not None
            return cell or ""
        if place is not None and place in self._seen:
            return ""
        self._seen.add(place)
        self.bad += 1
        self.first = self.first or reason
        if self.bad > self.limit:
            raise self._error(f"more than {self.limit} rows are no text")
        if self.bad == 1:
            log.warning("%s: a row is skipped, as %s", self.name, reason)
        return ""

    def finish(self) -> None:
        """Raise `UserError` if there were bad rows and no other."""
        if self.bad and not self.good:
            raise self._error(f"all {self.bad} rows are no text" if self.bad > 1 else "")

    def report(self) -> None:
        """Log how many rows were skipped, if any."""
        if self.bad:
            log.warning("%s: %d rows skipped; the first: %s", self.name, self.bad, self.first)

    def _problem(self, cell: Any) -> str | None:
        if isinstance(cell, Unreadable):
            return cell.reason
        if cell is None:
            return None
        if not isinstance(cell, str):
            return f"column {self.text_key!r} holds {type(cell).__name__}, not text"
        if not cell.isascii() and not _is_unicode(cell):
            return "its text has half a character (a lone surrogate)"
        return None

    def _error(self, count: str) -> UserError:
        more = f"{count}; the first: " if count else ""
        allow = ", or data.max_bad_rows" if count else ""
        return UserError(f"cannot read {self.name}: {more}{self.first}; set data.text_key{allow}")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
