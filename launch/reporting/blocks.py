"""What a page is made of, as plain data; `templates/page.html` says how each looks.

A page is a list of sections, and a section a list of blocks. Text is text: the template escapes
it. Only pictures (`launch.drawing`) and tables (`launch.drawing.table`) are markup, both written by
this project.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from launch.drawing.table import Table

MOST_PANELS = 8
"""Panels that are shown at once; of more, some are folded away."""


@dataclass(frozen=True)
class Bar:
    """One bar: its label, its length and a mark on it in percent, and its value as text."""

    role: str
    label: str
    percent: float
    text: str
    mark: float | None = None


@dataclass(frozen=True)
class Bars:
    """Bars below each other, under a line of text."""

    bars: Sequence[Bar]
    heading: str = ""
    thin: bool = False


@dataclass(frozen=True)
class Panel:
    """A picture or bars under a heading, and a line of coloured words between."""

    heading: str
    picture: str = ""
    """Inline SVG; empty where there was too little to draw."""
    blocks: Sequence["Block"] = ()
    words: Sequence[tuple[str, str]] = ()
    """(role, text) pairs, after `words_label`."""
    words_label: str = ""


@dataclass(frozen=True)
class Panels:
    """Panels side by side; `folded` ones open on demand, under `summary`."""

    panels: Sequence[Panel]
    folded: Sequence[Panel] = ()
    summary: str = ""
    thin: bool = False


@dataclass(frozen=True)
class TableBlock:
    """A table that scrolls inside the page where it is wider."""

    table: Table
    look: str = ""
    heading: str = ""


@dataclass(frozen=True)
class Folded:
    """Blocks that open on demand."""

    summary: str
    blocks: Sequence["Block"]


@dataclass(frozen=True)
class Record:
    """How it was made: command lines and facts."""

    commands: Sequence[str]
    facts: Mapping[str, Any]


Block = Bars | Panels | TableBlock | Folded | Record


@dataclass(frozen=True)
class Section:
    """A heading, a sentence in grey, and blocks."""

    heading: str
    note: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Tile:
    """A change that matters: what changed, by how much, from what to what."""

    label: str
    change: str
    values: str


def render(
    title: str,
    verdict: str,
    sections: Sequence[Section],
    tiles: Sequence[Tile] = (),
    note: str = "",
) -> str:
    """The page as HTML: one file with its style and pictures, without a script or a link."""
    page = _environment().get_template("page.html")
    return page.render(title=title, verdict=verdict, sections=sections, tiles=tiles, note=note)


def panels(found: Sequence[Panel], kind: str = "layers") -> Panels:
    """Panels side by side; of many, some from first to last are shown and the rest folded away."""
    if len(found) <= MOST_PANELS:
        return Panels(found)
    shown = {index * (len(found) - 1) // (MOST_PANELS - 1) for index in range(MOST_PANELS)}
    folded = [panel for index, panel in enumerate(found) if index not in shown]
    summary = f"The other {len(folded)} {kind}"
    return Panels([found[index] for index in sorted(shown)], folded, summary)


def bars(
    values: Mapping[str, float],
    labels: Mapping[str, str],
    texts: Mapping[str, str],
    log: bool = False,
    mark: float | None = None,
    role: str = "",
    **look: Any,
) -> Bars:
    """One bar for each value.

    Args:
        values: lengths by name; a value that is not finite has no bar.
        labels, texts: what is written before and behind each bar.
        log: the length is the logarithm of the value; the bar starts at 1.
        mark: a value at which every row gets a thin line, to compare with.
        role: the colour of all bars; by default each has that of its name.
        look: `heading` and `thin` of the block.
    """
    most = max(filter(math.isfinite, values.values()), default=0.0)

    def share(value: float) -> float:
        if not math.isfinite(value) or most <= 0:
            return 0.0
        if log:
            return 100 * math.log(max(value, 1.0)) / max(math.log(most), 1e-12)
        return 100 * max(value, 0.0) / most

    place = None if mark is None else share(mark)
    found = [
        Bar(role or name, labels.get(name, name), share(value), texts[name], place)
        for name, value in values.items()
    ]
    return Bars(found, **look)


@cache
def _environment() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    from launch.drawing.figure import DARK, LIGHT, variables

    folder = Path(__file__).with_name("templates")
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"light": variables(LIGHT), "dark": variables(DARK)}
    environment.filters["kind"] = lambda block: type(block).__name__
    return environment
