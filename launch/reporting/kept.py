"""A report's drawings of what a plan kept."""

from launch.drawing.bars import channel_grid
from launch.reporting.data import ReportData
from launch.reporting.page_parts import panels, section

KEPT_WORDS = {
    "key": (
        "Kept key channels",
        "channels a head",
        "A row is a key head, a column one of its channels",
    ),
    "value": (
        "Kept value channels",
        "value channels",
        "A column is a channel, the same one in every head of the layer",
    ),
    "head": ("Kept heads", "heads", "A column is a key head, with the value heads that share it"),
}
"""By kind of space: heading, what is counted, and what a drawing means."""


def kept_section(data: ReportData) -> str:
    """What the plan kept, a part for each kind of space."""
    return "".join(_kept_of_kind(data, kind) for kind in KEPT_WORDS)


def _kept_of_kind(data: ReportData, kind: str) -> str:
    layers = [layer for layer in data.kept if layer.kind == kind]
    if not layers:
        return ""
    heading, of, meaning = KEPT_WORDS[kind]
    drawn = []
    for layer in layers:
        counts = sorted({len(channels) for channels in layer.kept}) or [0]
        count = " to ".join(map(str, (counts[0], counts[-1])[: len(counts)]))
        title = f"Layer {layer.layer}: {count} of {layer.head_dim} {of}"
        drawn.append(f"<h3>{title}</h3>{channel_grid(layer.kept, layer.head_dim, title)}")
    return section(heading, f"{meaning}; {data.method} kept the filled ones.", panels(drawn))
