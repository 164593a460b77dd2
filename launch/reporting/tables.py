"""The tables of a report, the same in HTML, Markdown and LaTeX."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from launch.drawing.table import Column, Table
from launch.reporting.claims import against_control
from launch.reporting.data import Measured, RankAnalysis, Recall, ReportData, Row, Scores
from launch.speed.bench_table import bench_table, kernel_lines
from launch.sweeping.tables import HEADING as SWEEP_HEADING
from launch.sweeping.tables import NOTE as SWEEP_NOTE
from launch.sweeping.tables import sweep_of

MODEL_COLUMNS = (
    Column("model", "model", align="left"),
    Column("made", "how it came about", align="left"),
    Column("parameters", "parameters", ",.0f"),
    Column("state_bytes", "state bytes a sequence", ",.0f"),
)
"""The columns of the table of models; those of decoding speed follow."""

TEXT_COLUMNS = (
    Column("model", "model", align="left"),
    Column("perplexity", "perplexity", ",.3f"),
    Column("error", "±", ",.3f"),
    Column("bits_per_byte", "bits per byte", ".4f"),
    Column("rise", "nats a token above its control [95 %]"),
    Column("control", "control", align="left"),
)
"""The columns of a table of perplexities."""

RANK_COLUMNS = (
    Column("model", "model", align="left"),
    Column("layer", "layer", "d"),
    Column("stable_rank", "stable rank", ".2f"),
    Column("utilisation", "utilisation", ".3f"),
    Column("threshold_rank", "threshold rank", ".2f"),
    Column("entropy_rank", "entropy rank", ".2f"),
    Column("nuclear_norm", "nuclear norm", ".4g"),
    Column("sigma_ratio", "σ₁/σ_d", ".3g"),
    Column("decay", "decay", ".4f"),
    Column("beta", "β", ".3f"),
)
"""Means over heads of what `slimstate analyze` measures; each layer is a row."""

NOISE_COLUMNS = (
    Column("model", "model", align="left"),
    Column("layer", "layer", "d"),
    Column("stable_rank", "stable rank", ".2f"),
    Column("amplification", "amplification", ".3f"),
    Column("random_queries", "of random queries", ".3f"),
    Column("error_at_10_percent", "error at 10% noise", ".3f"),
)
NOISE_NOTE = (
    "How much of the noise in a query reaches a layer's output: amplification is the squared "
    "relative error of the output over that of the query, beside what random queries would see "
    "in a state of that stable rank. Means over heads, geometric but for the rank."
)


class Titled(NamedTuple):
    """A table under its heading, with a sentence that a reader of it needs."""

    heading: str
    note: str
    table: Table


def all_tables(data: ReportData) -> Iterator[Titled]:
    """Yield every table that `data` has something for, in the order of the page."""
    if data.rows:
        yield Titled("Models", MODELS_NOTE, models_table(data))
    for text in data.texts:
        yield Titled(text.heading, TEXT_NOTE, text_table(data, text))
    if data.plans:
        yield Titled("What was pruned, and how", "", plans_table(data.plans))
    if data.tasks:
        yield Titled("Tasks", "", scores_table(data.tasks, data.rows))
    if data.fidelity:
        yield Titled("Fidelity", FIDELITY_NOTE, fidelity_table(data))
    for recall in data.recall:
        yield Titled(recall.heading, RECALL_NOTE, recall_table(recall))
    if data.query_noise:
        yield Titled("Query noise", NOISE_NOTE, noise_table(data.query_noise))
    for analysis in data.ranks:
        yield Titled(analysis.heading, analysis.note, ranks_table(analysis))
    for record in data.bench:
        yield Titled(bench_heading(record), " ".join(kernel_lines(record)), bench_table(record))
    for heading, (sentences, table) in data.serving.items():
        if table.rows:
            yield Titled(heading, " ".join(sentences), table)
    for results in data.sweeps:
        for table in sweep_of(results).tables():
            yield Titled(SWEEP_HEADING, SWEEP_NOTE, table)


MODELS_NOTE = (
    "The state is what decoding keeps for one sequence over all layers, in fp32, without "
    "convolution caches. What was pruned from what is told by fingerprints of the weights. Speeds "
    "in one column are of one benchmark at one batch size."
)
TEXT_NOTE = (
    "Perplexity is e to the mean negative log-likelihood of a token; ± is its standard error, with "
    "documents as the sample. The control of a pruned model is what it was pruned from, trained on "
    "as many tokens; the interval is of a bootstrap over the same documents. Training has no error "
    "bars: each model is one run."
)
FIDELITY_NOTE = (
    "KL divergence of the model's predictions from another model's, and the share of tokens for "
    "which both put the same token first."
)
RECALL_NOTE = "Share of the values recalled that stood behind their keys."


def models_table(data: ReportData) -> Table:
    """Return a row for each run: how it came about, its sizes, and decoded tokens per second."""
    columns = [*MODEL_COLUMNS, *(Column(heading, number=",.1f") for heading in data.speeds)]
    rows = [
        {"model": name, **row, "made": data.lineages[name].text if name in data.lineages else None}
        for name, row in data.rows.items()
    ]
    return _used(columns, rows)


def text_table(data: ReportData, text: Measured) -> Table:
    """Return a row for each model that was measured on a text."""
    rows = []
    for name, record in text.records.items():
        claim = against_control(data, text, name)
        compared = {"rise": claim.difference.text(), "control": claim.control} if claim else {}
        rows.append({"model": name, **record, **compared})
    return _used(TEXT_COLUMNS, rows)


def fidelity_table(data: ReportData) -> Table:
    """Return a row for each model that was compared with another one."""
    columns = (
        Column("model", "model", align="left"),
        Column("kl", "KL, nats a token", ".4f"),
        Column("agreement", "same first token", ".4f"),
        Column("tokens", "tokens", ",d"),
        Column("other", "compared with", align="left"),
    )
    rows = [
        {"model": name, **record, "other": _ending(record.get("against"))}
        for name, record in data.fidelity.items()
    ]
    return _used(columns, rows)


def summary_table(rows: Mapping[str, Row]) -> Table:
    """Return the figures of a demo's models, one on each row."""
    columns = (
        Column("model", "model", align="left"),
        Column("perplexity", "perplexity", ",.3f"),
        Column("error", "±", ",.3f"),
        Column("bits_per_byte", "bits per byte", ".4f"),
        Column("parameters", "parameters", ",.0f"),
        Column("state_bytes", "state bytes a sequence", ",.0f"),
        Column("decode_tokens_per_second", "decoded tokens/s", ",.1f"),
    )
    return _used(columns, [{"model": name, **row} for name, row in rows.items()])


def _used(columns: Sequence[Column], rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return a table without the columns that no row has a value for."""
    known = {key for row in rows for key, value in row.items() if value is not None}
    return Table([column for column in columns if column.key in known], rows)


def _ending(path: Any) -> str | None:
    """The last parts of a path, a run and its step."""
    parts = [part for part in Path(str(path)).parts if part != "checkpoint"]
    return "/".join(parts[-2:]) if path else None


def plans_table(plans: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return a table with a row for each fact of a plan, a column for each pruned model."""
    facts = list(dict.fromkeys(fact for plan in plans.values() for fact in plan))
    columns = [Column("fact", " ", align="left"), *(Column(n) for n in plans)]
    rows = [
        {"fact": fact, **{n: _text(plan.get(fact)) for n, plan in plans.items()}} for fact in facts
    ]
    return Table(columns, rows)


def scores_table(scores: Scores, models: Mapping[str, Any]) -> Table:
    """Return a table with a row for each quantity, a column for each model with a score.

    Columns are in the order of `models`; models that are not in it follow by name.
    """
    scored = {name for values in scores.values() for name in values}
    names = [*(name for name in models if name in scored), *sorted(scored - set(models))]
    columns = [Column("task", " ", align="left"), *(Column(n, number=".4f") for n in names)]
    return Table(columns, [{"task": task, **values} for task, values in scores.items()])


def recall_table(recall: Recall) -> Table:
    """Return a table with a row for each difficulty, a column for each model."""
    columns = [Column("x", recall.x_label, "g", align="left")]
    columns += [Column(name, number=".1%") for name in recall.curves]
    xs = sorted({x for curve in recall.curves.values() for x in curve[0]})
    points = {name: dict(zip(*curve, strict=True)) for name, curve in recall.curves.items()}
    return Table(columns, [{"x": x, **{n: points[n].get(x) for n in points}} for x in xs])


def noise_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return a table with a row for each model and layer."""
    return Table(NOISE_COLUMNS, rows)


def ranks_table(analysis: RankAnalysis) -> Table:
    """Return a table with a row for each model and layer, a column for each metric."""
    known = {key for row in analysis.layers for key in row}
    return Table(
        [column for column in RANK_COLUMNS if column.key in known],
        analysis.layers,
    )


def bench_heading(record: Mapping[str, Any]) -> str:
    names = [name for name in record["models"] if name != record.get("against")]
    against = f" against {record['against']}" if record.get("against") else ""
    return f"Speed and memory of {', '.join(names)}{against}"


def _text(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, float):
        return f"{value:g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def markdown_tables(data: ReportData) -> Iterator[str]:
    """Yield every table under its heading, as Markdown."""
    for heading, note, table in all_tables(data):
        yield "\n\n".join(part for part in (f"## {heading}", note, table.markdown()) if part)


def latex_tables(data: ReportData) -> Iterator[str]:
    """Yield every table as a booktabs `tabular` after a comment with its heading; no notes."""
    for heading, _, table in all_tables(data):
        yield f"% {_one_line([heading])}\n{table.latex()}"


def _one_line(parts: Sequence[str]) -> str:
    return " ".join(" ".join(parts).split())
