"""The tables of a comparison: a grid of methods against ratios for each figure, and every row."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from launch.drawing.table import Column, Table
from launch.sweeping.tables import STAGES, percent

Row = Mapping[str, Any]

VERDICTS = {-1: "ahead", 0: "level", 1: "behind"}
"""Of a difference that is surely below zero, may be either, or is surely above."""


class Figure(NamedTuple):
    """What a grid shows of each row."""

    key: str
    heading: str
    number: str
    beside: bool
    """Whether it is shown beside that of the reference method."""


FIGURES = (
    Figure("rise", "Rise of the loss, nats a token", "+.4f", False),
    Figure("rise", "Rise of the loss, as a part of that", ".2f", True),
    Figure("kl", "KL from the dense model, nats a token", ".4f", False),
    Figure("kl", "KL, as a part of that", ".2f", True),
)

NOTE = (
    "Rise: over the dense model's loss on the same documents; of recovered models over that of the "
    "dense model trained on for as long. KL: of the dense model's predictions from the model's. "
    "± is the standard deviation over models. Beside the reference: the ratio with its 95 % "
    "interval by a paired bootstrap over documents (none where the reference's own rise may be "
    "chance), whether the difference lies beyond its interval (ahead: smaller), and in how many of "
    "the models it does."
)

COLUMNS = tuple(
    Column(key, heading, number, "left" if not number else "right")
    for key, heading, number in (
        ("group", "models", ""),
        ("method", "method", ""),
        ("space", "space", ""),
        ("ratio", "ratio", ""),
        ("stage", "stage", ""),
        ("models", "of", "d"),
        *(
            entry
            for key, name in (("rise", "rise"), ("kl", "KL"))
            for entry in (
                (key, name, ".5f"),
                (f"{key}_low", "from", ".5f"),
                (f"{key}_high", "to", ".5f"),
                (f"{key}_spread", "±", ".5f"),
                (f"{key}_ratio", "ratio", ".3f"),
                (f"{key}_ratio_low", "from", ".3f"),
                (f"{key}_ratio_high", "to", ".3f"),
                (f"{key}_worst", "worst", ".3f"),
                (f"{key}_ahead", "ahead", "d"),
                (f"{key}_behind", "behind", "d"),
            )
        ),
        ("reference", "reference", ""),
    )
)


class Grid(NamedTuple):
    """A table under its heading."""

    group: str
    heading: str
    table: Table


def grids(rows: Sequence[Row]) -> Iterator[Grid]:
    """For each group of models and each figure, methods against ratios and stages."""
    for group in dict.fromkeys(row["group"] for row in rows):
        own = [row for row in rows if row["group"] == group]
        beside = ", ".join(dict.fromkeys(r["reference"] for r in own if r.get("reference")))
        for figure in FIGURES:
            table = _grid(own, figure)
            if table is not None:
                heading = f"{group}: {_lower(figure.heading)}"
                yield Grid(group, f"{heading} of {beside}" if figure.beside else heading, table)


def every_row(rows: Sequence[Row]) -> Table:
    """All figures; columns of which no row has a value are left out."""
    used = [c for c in COLUMNS if any(row.get(c.key) is not None for row in rows)]
    return Table(used, [{**row, "stage": STAGES[row["stage"]]} for row in rows])


def _grid(rows: Sequence[Row], figure: Figure) -> Table | None:
    if figure.beside:
        rows = [row for row in rows if row.get("reference")]
    if not rows:
        return None
    columns = [Column("method", "method", align="left")]
    if len({row["space"] for row in rows}) > 1:
        columns.append(Column("space", "removes", align="left"))
    places = sorted({(_number(row["ratio"]), row["ratio"], row["stage"]) for row in rows})
    columns += [
        Column(f"{ratio} {stage}", f"{percent(ratio)} {STAGES[stage]}")
        for _, ratio, stage in places
    ]
    lines: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        line = lines.setdefault((row["space"], row["method"]), {})
        line |= {"method": row["method"], "space": row["space"]}
        line[f"{row['ratio']} {row['stage']}"] = _cell(row, figure)
    return Table(columns, list(lines.values()))


def _cell(row: Row, figure: Figure) -> str:
    if not figure.beside:
        return with_spread(row, figure.key, figure.number)
    key = figure.key
    verdict = VERDICTS[row[f"{key}_sign"]]
    if row["models"] > 1 and verdict != "level":
        count = row[f"{key}_ahead" if verdict == "ahead" else f"{key}_behind"]
        verdict += f" {count}/{row['models']}"
    ratio = row[f"{key}_ratio"]
    if ratio is None:
        return verdict
    number = figure.number
    low, high = row[f"{key}_ratio_low"], row[f"{key}_ratio_high"]
    return f"{ratio:{number}} [{low:{number}}, {high:{number}}] {verdict}"


def with_spread(row: Row, key: str, number: str) -> str:
    """A figure with its standard deviation over models; of one model with its interval."""
    text, spread, low, high = (
        f"{row[key]:{number}}",
        *(row.get(f"{key}_{end}") for end in ("spread", "low", "high")),
    )
    if spread is not None:
        return f"{text} ± {spread:.4f}"
    return text if low is None else f"{text} [{low:{number}}, {high:{number}}]"


def _number(ratio: str) -> float:
    try:
        return float(ratio)
    except ValueError:
        return 1.0


def _lower(heading: str) -> str:
    return heading if heading.startswith("KL") else heading[0].lower() + heading[1:]
