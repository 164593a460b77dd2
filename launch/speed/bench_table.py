"""The table of a benchmark's JSON: models side by side, medians with their spread, and ratios."""

from collections.abc import Mapping
from typing import Any

from launch.drawing.table import Column, Table
from launch.reporting.sentences import bytes_text

RATIO = "ratio"


def bench_table(record: Mapping[str, Any]) -> Table:
    """One row a measure, one column a model, and the ratio where there are two.

    Args:
        record: what `launch.bench.benchmark` returned, or its JSON.
    """
    names, against = list(record["models"]), record.get("against")
    is_pair = against is not None and len(names) == 2
    columns = [Column("label", "measure", align="left"), *(Column(name) for name in names)]
    if is_pair:
        other = next(name for name in names if name != against)
        columns.append(Column(RATIO, f"{other} ÷ {against}", ".3f"))
    rows = [
        {
            "label": _label(measure),
            **{n: cell(v, measure["unit"]) for n, v in measure["values"].items()},
            RATIO: measure.get("ratio"),
        }
        for measure in record["measures"]
    ]
    return Table(columns, rows)


def cell(value: Mapping[str, Any], unit: str) -> str:
    """A median, and in brackets the smallest and largest of several runs."""
    if unit == "bytes":
        return bytes_text(value["median"])
    if len(value.get("runs", ())) < 2:
        return figure(value["median"])
    least, most = figure(value["min"]), figure(value["max"])
    return f"{figure(value['median'])} [{least}–{most}]"


def figure(value: float) -> str:
    """Whole numbers and those from 1,000 on without decimals, others with three or four digits."""
    if value == int(value) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.3g}"


def ratio_of(measure: Mapping[str, Any], against: str | None) -> float | None:
    """The model's median over that of `against`; None without exactly two, or if that is 0."""
    values = measure["values"]
    if len(values) != 2 or against not in values or not values[against]["median"]:
        return None
    other = next(name for name in values if name != against)
    return values[other]["median"] / values[against]["median"]


def kernel_lines(record: Mapping[str, Any]) -> list[str]:
    """Sentences: where it was measured, by which operators of the delta rule, what is missing."""
    where = f"{record['device_name']} ({record['device']}, {record['dtype']}"
    threads = f", {record['threads']} CPU threads" if record["device"] == "cpu" else ""
    lines = [
        f"Measured on {where}{threads}); medians of {record['repeats']} runs, in brackets the "
        f"least and the most. Peak memory is {record['peak_memory']}."
    ]
    for phase in ("prefill", "decode"):
        found = {n: delta_kernels(model["kernels"][phase]) for n, model in record["models"].items()}
        shown = sorted(set(found.values()))
        if len(shown) == 1:
            lines.append(f"{phase.capitalize()} ran {shown[0]}.")
        else:
            lines += [f"{phase.capitalize()} of {name} ran {ran}." for name, ran in found.items()]
    return [*lines, *record.get("notes", [])]


DELTA_OPERATORS = ("delta_rule", "delta_product", "kda")
"""What the names of operators and kernels of the delta rule have in them."""


def delta_kernels(names: list[str]) -> str:
    """The operators of the delta rule among `names`, and whose they are."""
    bare = {name: name.rpartition(".")[2] for name in names}
    found = [name for name in names if any(word in bare[name] for word in DELTA_OPERATORS)]
    if not found:
        return "no delta-rule operator"
    compiled = [name for name in found if name.startswith("triton: ")]
    if compiled:
        return f"fla's Triton kernels ({', '.join(n.removeprefix('triton: ') for n in compiled)})"
    return f"this project's PyTorch operators ({', '.join(found)})"


def _label(measure: Mapping[str, Any]) -> str:
    unit = measure["unit"]
    return f"{measure['label']}, {unit}" if unit and unit != "bytes" else measure["label"]
