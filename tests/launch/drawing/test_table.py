"""The table writer: one table in each of its forms."""

import csv
import io
import re

from launch.drawing.table import LATEX, Column, Table
from launch.reporting.render import environment

TABLE = Table(
    [
        Column("model", align="left"),
        Column("perplexity", number=".2f"),
        Column("bytes", "state bytes", number=","),
    ],
    [
        {"model": "dense", "perplexity": 12.3456, "bytes": 1048576},
        {"model": "a|b <c>", "perplexity": float("inf"), "bytes": None},
        {"model": "two\nlines", "bytes": 7},
    ],
)


def test_text_is_aligned() -> None:
    assert TABLE.text().splitlines() == [
        "model      perplexity  state bytes",
        "---------  ----------  -----------",
        "dense           12.35    1,048,576",
        "a|b <c>           inf            -",
        "two lines           -            7",
    ]


def test_markdown_escapes_its_separator() -> None:
    assert TABLE.markdown().splitlines() == [
        "| model | perplexity | state bytes |",
        "| :--- | ---: | ---: |",
        "| dense | 12.35 | 1,048,576 |",
        "| a\\|b <c> | inf | - |",
        "| two lines | - | 7 |",
    ]


def test_csv_keeps_values_whole() -> None:
    rows = list(csv.DictReader(io.StringIO(TABLE.csv())))
    assert [row["model"] for row in rows] == ["dense", "a|b <c>", "two\nlines"]
    assert [row["perplexity"] for row in rows] == ["12.3456", "inf", ""]
    assert [row["bytes"] for row in rows] == ["1048576", "", "7"]


def test_html_escapes_text() -> None:
    text = environment().get_template("parts.html").module.table(TABLE)
    lines = text.partition("<table>")[2].partition("</table>")[0].strip().splitlines()
    assert lines[0].count("<th ") == 3 and len(lines) == 4
    assert '<td class="left">a|b &lt;c&gt;</td><td class="right">inf</td>' in lines[2]


def test_no_rows_is_a_heading() -> None:
    assert Table([Column("name")], []).text() == "name\n----"


def test_truth_values_are_text() -> None:
    assert Column("ok", number=".2f").cell(True) == "True"


def test_latex_is_a_booktabs_tabular() -> None:
    assert TABLE.latex().splitlines() == [
        r"\begin{tabular}{lrr}",
        r"\toprule",
        r"model & perplexity & state bytes \\",
        r"\midrule",
        r"dense & 12.35 & 1,048,576 \\",
        r"a\textbar{}b \textless{}c\textgreater{} & inf & - \\",
        r"two lines & - & 7 \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


def test_latex_reads_back_as_what_was_written() -> None:
    """Every special sign, and cells that would change the command before them."""
    signs = "".join(LATEX)
    cells = [
        ["a & b_c", "50% of #1", "$x^2$ ~ {y}"],
        ["[least]", "*", "\\\\[3pt]"],
        [signs, "", "-"],
    ]
    columns = [Column(key) for key in ("a_1", "b", "c")]
    table = Table(columns, [dict(zip(("a_1", "b", "c"), row, strict=True)) for row in cells])
    lines = table.latex().splitlines()
    assert _read_latex(lines[2]) == ["a_1", "b", "c"]
    assert [_read_latex(line) for line in lines[4:-2]] == cells
    assert all(line.count("{") == line.count("}") for line in _without_escapes(lines))
    assert not any(line.startswith(("[", "*")) for line in lines)


def _read_latex(line: str) -> list[str]:
    """The cells of a line of a tabular, as LaTeX would print them."""
    assert line.endswith(r" \\")
    cells = re.split(r"(?<!\\) & ", line.removesuffix(r" \\"))
    return [_printed(re.sub(r"^\{([[*])\}", r"\1", cell)) for cell in cells]


def _printed(cell: str) -> str:
    written = sorted(LATEX.items(), key=lambda pair: -len(pair[1]))
    text = ""
    while cell:
        sign, code = next(((s, c) for s, c in written if cell.startswith(c)), (cell[0], cell[0]))
        text, cell = text + sign, cell[len(code) :]
    return text


def _without_escapes(lines: list[str]) -> list[str]:
    return [re.sub(r"\\[{}]", "", line) for line in lines]
