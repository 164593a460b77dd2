"""The table writer: one table in each of its forms."""

import csv
import io

from launch.table import Column, Table

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
    lines = TABLE.html().splitlines()
    assert lines[0] == "<table>" and lines[-1] == "</table>"
    assert '<td class="left">a|b &lt;c&gt;</td><td class="right">inf</td>' in lines[3]
    assert lines[1].count("<th ") == 3


def test_no_rows_is_a_heading() -> None:
    assert Table([Column("name")], []).text() == "name\n----"


def test_truth_values_are_text() -> None:
    assert Column("ok", number=".2f").cell(True) == "True"
