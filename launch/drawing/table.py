"""One table, written as text for a terminal, CSV, Markdown or LaTeX."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

MISSING = "-"
"""The text of a cell without a value; in CSV such a cell is empty."""

LATEX = {
    "\\": r"\textbackslash{}",
    **{sign: "\\" + sign for sign in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "×": r"$\times$",
    "÷": r"$\div$",
    "±": r"$\pm$",
    "−": r"$-$",
    "–": "--",
    "…": r"\dots{}",
    "→": r"$\to$",
    "σ": r"$\sigma$",
    "α": r"$\alpha$",
    "β": r"$\beta$",
    "ε": r"$\epsilon$",
    "₁": "$_1$",
}
"""LaTeX for characters that would be commands or that its fonts lack."""


@dataclass(frozen=True)
class Column:
    """One column: the key of its values in a row, its heading, and how a value is written."""

    key: str
    heading: str = ""
    """What the reader sees; the key if empty. CSV keeps the key, for programs."""

    number: str = ""
    """Format specification of numbers, e.g. `,.2f`; text is written as it is."""

    align: Literal["left", "right"] = "right"

    def cell(self, value: Any) -> str:
        """Return `value` as a reader sees it, on one line."""
        if value is None:
            return MISSING
        if isinstance(value, int | float) and not isinstance(value, bool):
            return format(value, self.number)
        return " ".join(str(value).split())


@dataclass(frozen=True)
class Table:
    """Rows are mappings from column keys to values; a key that a row lacks is a missing value."""

    columns: Sequence[Column]
    rows: Sequence[Mapping[str, Any]]

    def lines(self) -> list[list[str]]:
        """Return the headings, then the cells of each row, as a reader sees them."""
        cells = [[column.cell(row.get(column.key)) for column in self.columns] for row in self.rows]
        return [[column.heading or column.key for column in self.columns], *cells]

    def text(self) -> str:
        """Return aligned columns with a rule under the headings, for a terminal."""
        lines = self.lines()
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        lines.insert(1, ["-" * width for width in widths])
        return "\n".join(self._padded(line, widths).rstrip() for line in lines)

    def markdown(self) -> str:
        rule = ["---:" if column.align == "right" else ":---" for column in self.columns]
        lines = [[_escaped(cell) for cell in line] for line in self.lines()]
        lines.insert(1, rule)
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def csv(self) -> str:
        """Return keys as header and unrounded values: RFC 4180, but with `\\n` line ends."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow([column.key for column in self.columns])
        writer.writerows([row.get(column.key) for column in self.columns] for row in self.rows)
        return buffer.getvalue()

    def latex(self) -> str:
        """Return a `tabular` in the style of the package booktabs, which the document must load.

        Text is escaped; signs in `LATEX` that are mathematical become mathematics.
        """
        alignment = "".join(column.align[0] for column in self.columns)
        headings, *cells = map(_latex_line, self.lines())
        lines = [headings, r"\midrule", *cells]
        begin, end = rf"\begin{{tabular}}{{{alignment}}}", r"\end{tabular}"
        return "\n".join([begin, r"\toprule", *lines, r"\bottomrule", end])

    def _padded(self, line: Sequence[str], widths: Sequence[int]) -> str:
        cells = zip(self.columns, line, widths, strict=True)
        pad = {"left": str.ljust, "right": str.rjust}
        return "  ".join(pad[column.align](cell, width) for column, cell, width in cells)


def _escaped(cell: str) -> str:
    return cell.replace("\\", "\\\\").replace("|", "\\|")


def _latex_line(cells: Sequence[str]) -> str:
    return " & ".join(map(_latex_cell, cells)) + r" \\"


def _latex_cell(cell: str) -> str:
    r"""Escape `cell`; brace a first `[` or `*`, which would belong to the `\\` before it."""
    text = "".join(LATEX.get(sign, sign) for sign in cell)
    return f"{{{text[0]}}}{text[1:]}" if text[:1] in ("[", "*") else text
