"""Parts that a report's page is put together from: sections, panels side by side, drawings."""

import re
from collections.abc import Sequence
from html import escape

MOST_PANELS = 8
"""Charts of layers that are shown at once."""


def section(heading: str, note: str, body: str) -> str:
    """A section of the page: a heading, a sentence in grey, and its HTML."""
    text = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(heading)}</h2>{text}{body}</section>"


def panels(found: Sequence[str], kind: str = "layers") -> str:
    """Panels side by side; of many, some from first to last are shown and the rest folded away."""
    if len(found) <= MOST_PANELS:
        return grid(found)
    shown = {index * (len(found) - 1) // (MOST_PANELS - 1) for index in range(MOST_PANELS)}
    folded = [panel for index, panel in enumerate(found) if index not in shown]
    summary = f"<summary>The other {len(folded)} {kind}</summary>"
    return (
        grid([found[index] for index in sorted(shown)])
        + f"<details>{summary}{grid(folded)}</details>"
    )


def grid(found: Sequence[str]) -> str:
    return f'<div class="panels">{"".join(f"<div>{panel}</div>" for panel in found)}</div>'


def inline_drawing(svg: str) -> str:
    """An SVG file as part of the page: without what makes it stand alone.

    Its style, background and title go; namespace declarations and scripts too, so that the page
    refers to nothing outside.
    """
    text = svg[svg.index("<svg") :]
    for pattern in (
        r"<style>.*?</style>",
        r"<script.*?</script>",
        r'<rect class="page"[^>]*/>',
        r'<text class="title"[^>]*>.*?</text>',
        r'\sxmlns(:\w+)?="[^"]*"',
    ):
        text = re.sub(pattern, "", text, flags=re.S)
    text = re.sub(r'(<svg\b[^>]*?)\swidth="[^"]*" height="[^"]*"', r"\1", text, count=1)
    return re.sub(r'viewBox="([^"]*)"', _without_title, text, count=1)


def _without_title(box: re.Match[str]) -> str:
    """A view box that begins at 0, not at the strip above it that a title stood in."""
    x, y, width, height = map(float, box[1].split())
    return f'viewBox="{x:g} {max(y, 0):g} {width:g} {height + min(y, 0):g}"'
