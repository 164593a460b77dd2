"""Pictures: what they show, that labels keep apart, and that no setting of matplotlib changes."""

import math
import re
from xml.etree import ElementTree

import matplotlib
import pytest

from launch.drawing.distributions import bin_edges, histogram, pairs, scatter
from launch.drawing.figure import DARK, LIGHT, SERIES, number, svg_file
from launch.drawing.heatmaps import LEGEND_CELLS, channel_grid, heat_map, runs
from launch.drawing.lines import MOST_LETTERS, Line, line_chart, spread

LINES = [Line("dense", "one", [0, 5, 10], [0.0, 0.5, 1.0]), Line("x", "two", [0, 10], [1.0, 1.0])]


def test_every_role_has_a_colour_on_either_page() -> None:
    assert list(LIGHT) == list(DARK) and set(SERIES) < set(LIGHT)
    assert len(set(LIGHT.values())) == len(LIGHT) and len(set(DARK.values())) == len(DARK)


def test_the_same_data_give_the_same_bytes_and_settings_stay() -> None:
    before = dict(matplotlib.rcParams)
    first = line_chart(LINES, "x", "y", "t")
    assert first == line_chart(LINES, "x", "y", "t")
    assert dict(matplotlib.rcParams) == before
    assert not re.search("#fe01|matplotlib|xmlns|<!--|<style|<metadata", first)


def test_lines_have_their_colours_labels_and_round_numbers() -> None:
    chart = line_chart(LINES, "tokens, millions", "loss, nats", "a <title>")
    for text in ("0", "0.2", "0.4", "0.6", "0.8", "1", "10", "tokens, millions", "loss, nats"):
        assert f">{text}<" in chart, text
    for role in ("dense", "other"):
        assert re.search(rf"fill: none; stroke: var\(--{role}\)", chart), role
    one, two = (float(re.search(rf'y="(\S+)"[^>]*>{name}<', chart)[1]) for name in ("one", "two"))  # type: ignore[index]
    assert abs(one - two) >= 13
    assert ElementTree.fromstring(chart).attrib["aria-label"] == "a <title>"
    assert line_chart([Line("dense", "one", [1, 2], [math.nan, 1.0])], "x", "y", "t") == ""


def test_logarithmic_axes_have_powers_of_ten() -> None:
    line = Line("dense", "", [1, 10, 1000], [1.0, 1e-3, 2e-8])
    chart = line_chart([line], "x", "y", "t", log_x=True, log_y=True)
    assert re.findall(">([\\d,.⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+)<", chart) == [
        "1,000", "100", "10", "1", "1", "0.01", "10⁻⁴", "10⁻⁶", "10⁻⁸",
    ]  # fmt: skip
    assert [number(value) for value in (-0.5, 9999, 12_500, 0)] == ["−0.5", "9,999", "12.5k", "0"]


def test_long_names_leave_room_for_the_picture() -> None:
    name = "a-model-with-a-name-" * 5
    for drawing in (
        line_chart([Line("dense", name, [1, 2], [1.0, 2.0])], "x", "y", "t"),
        pairs({"0": (1.0, 2.0)}, (name, "b"), ("layer", "rank"), "t"),
    ):
        assert f">{name[: MOST_LETTERS - 1]}…<" in drawing


def test_a_file_stands_alone() -> None:
    drawn = heat_map({"0": [1.0, 2.5]}, ("layer", "head"), "ranks <by> layer")
    file = ElementTree.fromstring(svg_file(drawn, "ranks <by> layer"))
    texts = [element.text for element in file.iter("{http://www.w3.org/2000/svg}text")]
    assert {"ranks <by> layer", "1.00", "2.50", "layer", "head"} <= set(texts)
    (style,) = file.iter("{http://www.w3.org/2000/svg}style")
    assert "--dense: #0072b2" in str(style.text) and "prefers-color-scheme: dark" in str(style.text)


def test_heat_map_numbers_cells_that_have_room() -> None:
    small = heat_map({"0": [1.0, 2.0], "1": [3.0, 4.0]}, ("layer", "head"), "t")
    assert all(f">{number}.00<" in small for number in (1, 2, 3, 4))
    large = heat_map({str(i): [float(j) for j in range(64)] for i in range(48)}, ("a", "b"), "t")
    assert cells(large) == 48 * 64 + LEGEND_CELLS and large.count("<text") < 100


def bar_heights(drawing: str, role: str) -> list[float]:
    """Heights of the bars that have the colour of a role."""
    paths = ElementTree.fromstring(drawing).iter("path")
    bars = [path.attrib["d"] for path in paths if f"fill: var(--{role})" in path.attrib["style"]]
    edges = [[float(y) for y in re.findall(r"[ML] \S+ (\S+)", bar)] for bar in bars]
    return [max(edge) - min(edge) for edge in edges]


def cells(drawing: str) -> int:
    """Cells of a heat map and of its legend that have a colour."""
    return len(re.findall(r'style="fill: #[0-9a-f]{6}(?:; stroke[^"]*)?"', drawing))


def test_histogram_counts_every_head_once() -> None:
    values = [1.0, 1.1, 1.2, 5.0, 9.0]
    drawing = histogram(values, 3.0, "rank", "t")
    heights = [bar_heights(drawing, role) for role in ("dense", "pruned")]
    most = max(map(max, heights))
    assert [sum(round(3 * height / most) for height in found) for found in heights] == [3, 2]
    ElementTree.fromstring(histogram([2.0, 2.0], math.nan, "rank", "t"))
    assert any(edge == pytest.approx(3.0) for edge in bin_edges(values, 3.0))
    assert bin_edges([2.0, 2.0], math.nan) == [1.5, 2.5]


def test_grid_of_channels_shows_runs_and_gaps() -> None:
    drawing = channel_grid([[0, 1], [1, 3]], 4, "t")
    boxes = {}
    for path in ElementTree.fromstring(drawing).iter("path"):
        role = re.search(r"fill: var\(--(\w+)", path.attrib["style"])
        if role is not None:
            parts = [re.findall(r"[ML] (\S+)", f"M{part}") for part in path.attrib["d"].split("M")]
            ends = [[float(x) for x in part] for part in parts if part]
            boxes[role[1]] = [max(x) - min(x) for x in ends]
    (width,) = {round(box) for box in boxes["gone"]}
    shares = [box / width for box in boxes["pruned"]]
    assert shares == pytest.approx([0.5, 0.25, 0.25], abs=1e-3)
    assert all(f">{number}<" in drawing for number in range(4))


def test_pairs_and_scatter_show_every_point() -> None:
    drawn = pairs({"0": (1.0, 2.0), "7": (3.0, 2.5)}, ("a", "b"), ("layer", "rank"), "t")
    assert all(f">{text}<" in drawn for text in ("0", "7", "a", "b", "layer", "rank"))
    assert [drawn.count(f"fill: var(--{role})") for role in ("dense", "pruned")] == [4, 4]
    points = scatter([(1.0, 2.0), (2.0, 3.0), (3.0, 1.0)], ("a", "b"), "t", [True, False, False])
    uses = re.findall(r"<use [^>]*fill: var\(--(\w+)", points)
    assert sorted(uses) == ["dense", "dense", "pruned"]
    assert pairs({}, ("a", "b"), ("c", "d"), "t") == scatter([], ("a", "b"), "t") == ""


def test_chart_arithmetic() -> None:
    assert runs([0, 1, 2, 5, 7, 8]) == [(0, 3), (5, 1), (7, 2)]
    assert spread([10.0, 11.0, 50.0], 14.0, 0.0, 60.0) == [10.0, 24.0, 50.0]
    assert spread([58.0, 59.0], 14.0, 0.0, 60.0) == [46.0, 60.0]
