"""Pages from the templates in `templates/`, and the panels and bars that they lay out.

Text is text: the templates escape it. Only pictures are markup, which `launch.drawing` draws.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

MOST_PANELS = 8
"""Most panels that are shown at once; further ones are folded away."""


@dataclass(frozen=True)
class Bars:
    """Bars below each other: lengths by name; a bar is empty if its value is not finite."""

    values: Mapping[str, float]
    texts: Mapping[str, str]
    """What stands behind each bar."""
    role: str = ""
    """The colour of all bars; by default each has that of its name."""
    heading: str = ""
    mark: float | None = None
    """A value at which every row gets a thin line, to compare with."""
    log: bool = False
    """Whether a length is the logarithm of the value, so that bars start at 1."""

    def percent(self, value: float) -> str:
        """Return the length of `value`, in percent of the longest bar, as text."""
        most = max(filter(math.isfinite, self.values.values()), default=0.0)
        if not math.isfinite(value) or most <= 0:
            share = 0.0
        elif self.log:
            share = math.log(max(value, 1.0)) / max(math.log(most), 1e-12)
        else:
            share = max(value, 0.0) / most
        return f"{100 * share:.2f}"


@dataclass(frozen=True)
class Panel:
    """A picture or bars under a heading."""

    heading: str
    picture: str = ""
    """Inline SVG; empty where there was too little to draw."""
    bars: Sequence[Bars] = ()
    stable_ranks: Mapping[str, str] | None = None
    """A stable rank as text by the name of its model."""


def folded(found: Sequence[Panel]) -> tuple[Sequence[Panel], Sequence[Panel]]:
    """Return the panels to show, spread from first to last, and those to fold away."""
    if len(found) <= MOST_PANELS:
        return found, ()
    shown = [index * (len(found) - 1) // (MOST_PANELS - 1) for index in range(MOST_PANELS)]
    rest = [panel for index, panel in enumerate(found) if index not in shown]
    return [found[index] for index in shown], rest


def render(template: str, **values: Any) -> str:
    """Return a page as HTML: one file with its style and pictures, without script or link."""
    return environment().get_template(template).render(**values)


@cache
def environment() -> Any:
    """Return Jinja's environment: text is escaped, and an undefined name is an error."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    from launch.drawing.figure import DARK, LIGHT, variables

    made = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.globals |= {"light": variables(LIGHT), "dark": variables(DARK)}
    made.globals |= {"folded": folded, "roles": list(LIGHT)}
    return made
