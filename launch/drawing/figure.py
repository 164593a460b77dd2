"""Pictures by matplotlib, as SVG that a page or a file of its own can hold.

Artists are coloured by role: `colour("dense")` is what matplotlib draws with, and in the SVG it
becomes the CSS variable `--dense`, which has one value on a light page and another on a dark one.
Text stays text, in the page's own font. A picture is 400 points wide and scales with its column,
so that it can be read on a phone. The same data give the same bytes.
"""

import io
import math
import re
import textwrap
import warnings
from collections.abc import Callable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 400.0, 250.0
LEFT, RIGHT, TOP, BOTTOM = 54.0, 16.0, 12.0, 42.0
"""Margins around the axes, in points."""

TITLE_LETTER = 7.9
"""Approximate width of a letter of a file's title, in points."""

LIGHT = {
    "page": "#fff", "ink": "#1b1f24", "soft": "#59636e", "rule": "#e3e6ea", "gone": "#eceff2",
    "dense": "#0072b2", "dense_continued": "#3d9bd6", "pruned": "#c8500a", "random": "#7b8088",
    "recovered": "#00805d", "other": "#8a5fa8", "s4": "#97740a", "s5": "#c02660", "s6": "#1b8a99",
    "s7": "#7a5c3e", "s8": "#5560c0", "s9": "#4f7a1c",
}  # fmt: skip
DARK = {
    "page": "#14171b", "ink": "#e8eaed", "soft": "#a0a8b2", "rule": "#2c3239", "gone": "#252b32",
    "dense": "#4aa8e0", "dense_continued": "#8cc9ef", "pruned": "#f08a4b", "random": "#989ea7",
    "recovered": "#2fbf93", "other": "#b795d0", "s4": "#d8b13f", "s5": "#ee7aa5", "s6": "#54c3d1",
    "s7": "#c29d78", "s8": "#98a1f2", "s9": "#9ac45c",
}  # fmt: skip
"""Colours by role, on a light page and on a dark one; they differ in lightness too."""

SERIES = ("pruned", "dense", "recovered", "other", "s4", "s5", "s6", "s7", "s8", "s9")
"""Roles for lines that have none of their own, in the order in which they are given out."""

ROLES = list(LIGHT)
STAND_IN = "#fe01{:02x}"
"""Colour that stands for a role while matplotlib draws, by its index in `ROLES`."""

SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def colour(role: str) -> str:
    """Return the colour of a role, for matplotlib; an unknown name has the colour of `other`."""
    return STAND_IN.format(ROLES.index(role if role in ROLES else "other"))


def picture(title: str, paint: "Callable[[Figure], None]", height: float = HEIGHT) -> str:
    """Return an inline `<svg>` of what `paint` draws on an empty figure.

    Args:
        title: what the picture shows, for readers that do not see it.
        paint: draws on the figure; called within this module's style.
        height: in points; the width is `WIDTH`.
    """
    import matplotlib
    from matplotlib.figure import Figure

    buffer = io.StringIO()
    with matplotlib.rc_context(_style()), warnings.catch_warnings():
        # A label in a script that the metrics' font lacks is drawn by the page's font.
        warnings.simplefilter("ignore")
        figure = Figure(figsize=(WIDTH / 72, height / 72), dpi=72)
        paint(figure)
        nothing = dict.fromkeys(("Date", "Creator", "Type", "Format"))
        figure.savefig(buffer, format="svg", metadata=nothing)
    return _inline(buffer.getvalue(), title)


def axes(
    figure: "Figure", right: float = RIGHT, bottom: float = BOTTOM, top: float = TOP
) -> "Axes":
    """Add axes with these margins, in points, and `LEFT` at the left; return them."""
    height = figure.get_figheight() * 72
    size = ((WIDTH - LEFT - right) / WIDTH, (height - top - bottom) / height)
    return figure.add_axes((LEFT / WIDTH, bottom / height, *size))


def set_ticks(axis: Any, ticks: Sequence[float]) -> None:
    """Put only these ticks on an axis of matplotlib, written by `number`."""
    axis.set_ticks(list(ticks), labels=[number(tick) for tick in ticks])
    axis.set_ticks([], minor=True)


def number(value: float) -> str:
    """Return a tick's text: below 0.01 the nearest power of ten, from 10,000 thousands as k."""
    if 0 < value < 0.01:
        return "10" + str(round(math.log10(value))).translate(SUPERSCRIPT)
    text = f"{value / 1000:,.6g}k" if abs(value) >= 10_000 else f"{value:,.6g}"
    return text.replace("-", "−")


def svg_file(drawing: str, title: str) -> str:
    """Return a `picture` as an SVG file with colours for light and dark, background and title."""
    svg = ElementTree.fromstring(drawing)
    width, height = (float(svg.get("viewBox", "").split()[side]) for side in (2, 3))
    lines = textwrap.wrap(title, int(width / TITLE_LETTER))
    top = 18 * len(lines) + 20
    heading = "".join(
        f'<text x="12" y="{18 * place + 18}" class="title">{escape(line)}</text>'
        for place, line in enumerate(lines)
    )
    svg.attrib |= {"x": "12", "y": f"{top}", "width": f"{width:g}", "height": f"{height:g}"}
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * width + 48:g}" '
        f'viewBox="0 0 {width + 24:g} {height + top + 12:g}">'
        f"<style>:root {{ {variables(LIGHT)} }} @media (prefers-color-scheme: dark) "
        f"{{ :root {{ {variables(DARK)} }} }} "
        ".title { font: 650 14px system-ui, sans-serif; fill: var(--ink); }</style>"
        f'<rect width="100%" height="100%" style="fill: var(--page)"/>{heading}'
        f"{ElementTree.tostring(svg, encoding='unicode')}</svg>\n"
    )


def variables(colours: dict[str, str]) -> str:
    """Return CSS declarations of the roles' colours."""
    return " ".join(f"--{role}: {value};" for role, value in colours.items())


def _style() -> dict[str, object]:
    soft = colour("soft")
    return {
        "svg.fonttype": "none", "svg.hashsalt": "slimstate", "text.parse_math": False,
        "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 11.5,
        "axes.labelsize": 11.5, "xtick.labelsize": 11.5, "ytick.labelsize": 11.5,
        "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none",
        "axes.edgecolor": soft, "axes.labelcolor": soft, "text.color": soft,
        "xtick.color": soft, "ytick.color": soft, "grid.color": colour("rule"),
        "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False,
        "axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True,
        "xtick.major.size": 0, "ytick.major.size": 0,
        "lines.solid_capstyle": "round", "lines.solid_joinstyle": "round",
    }  # fmt: skip


def _inline(svg: str, title: str) -> str:
    """Return matplotlib's file as part of a page: roles as variables, nothing superfluous."""
    root = ElementTree.fromstring(svg)
    root.remove(root[0])  # matplotlib's style sheet, which would hold for the whole page
    used = set(re.findall(r'(?<=#)\w+(?=[")])', svg))
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.tail = None
        element.text = element.text if element.tag == "text" else None
        given = {name.rpartition("}")[2]: text for name, text in element.attrib.items()}
        element.attrib = {
            name: _shortened(text) for name, text in given.items() if name != "id" or text in used
        }
    root.attrib = {
        "viewBox": root.attrib["viewBox"],
        "role": "img",
        "aria-label": title,
        "style": "stroke-linejoin: round",
    }
    return ElementTree.tostring(root, encoding="unicode")


def _shortened(attribute: str) -> str:
    text = re.sub(r"-?\d+\.\d{3,}", lambda found: f"{float(found[0]):.2f}", attribute)
    text = re.sub(r"#fe01(\w\w)", lambda found: f"var(--{ROLES[int(found[1], 16)]})", text)
    return re.sub(r"'DejaVu Sans'[^;]*", "system-ui, sans-serif", text.replace("\n", ""))
