"""Pruned states and states in fewer bits at equal bytes: divergence from the dense model, recall.

    python -m benchmarks.equal_bytes MODEL [SWEEP] [--only BEGINNING …] [--sequences 24]
        [--seq-len N] [--recall N,N] [--json FILE] [--svg FILE]

The dense model and every model of a sweep, made again from its plan, run once for each format of
stored states, as `slimstate eval` and `slimstate recall` do with `--state-dtype`. Rows of held-out
text are spread over all of it. With --recall the figure is the share of values recalled (MQAR).
`--draw FILE` draws the JSON of an earlier run, its models of --only, and measures nothing.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gain import built
from flame.checkpoint.load import load_model
from flame.checkpoint.reference import ModelReference, resolve
from flame.errors import run_stage
from flame.hugging_face.config_file import keeps_documents_apart, vocabulary_size
from launch.drawing.figure import SERIES, axes, picture, set_ticks, svg_file
from launch.drawing.lines import Line
from launch.drawing.sweep_chart import log_ticks
from launch.drawing.table import Column, Table
from launch.evaluation.heldout_text import HeldoutOptions, heldout_text
from launch.evaluation.stored_states import StateOptions, storage_text

FORMATS = (
    StateOptions("float32"),
    StateOptions("bfloat16"),
    StateOptions("float8"),
    StateOptions("float8", "tile"),
    StateOptions("int8"),
    StateOptions("int8", "tile"),
    StateOptions("int8", "row", "int4"),
    StateOptions("int8", "tile", "int4"),
)
DRAWN = ("float32", "bfloat16", "float8/tile", "int8/row", "int8/row+int4")
LEGEND = 134.0
"""Points at the right of the chart for the names of the formats."""

MERGED = 6
"""Rows of text that go through a model at once, as more packed documents."""


def main() -> None:
    run_stage(_main)


def _main() -> None:
    options = _options()
    if options.draw is None:
        records = list(_measured(options))
        if options.json:
            options.json.write_text(json.dumps(records, indent=1))
    else:
        records = json.loads(options.draw.read_text())
        records = [r for r in records if r["model"].startswith(("dense", *options.only))]
    print(_table(records).text())
    if options.svg:
        title = f"{'Recall' if 'recall' in records[0] else 'Divergence'} at equal state bytes"
        options.svg.write_text(svg_file(_chart(records, title), title))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="run folder whose recipe names held-out text")
    parser.add_argument("sweep", nargs="?", type=Path, help="folder of slimstate sweep")
    parser.add_argument("--only", nargs="*", default=[""], metavar="BEGINNING")
    parser.add_argument("--sequences", type=int, default=24)
    parser.add_argument("--seq-len", type=int, help="tokens a row (default: the recipe's)")
    parser.add_argument("--recall", type=lambda text: [int(n) for n in text.split(",")])
    parser.add_argument("--examples", type=int, default=128, help="documents of a recall figure")
    for name in ("json", "svg", "draw"):
        parser.add_argument(f"--{name}", type=Path)
    return parser.parse_args()


def _measured(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    from pruning.adapters import state_bytes
    from pruning.planning.plan_file import read_plan, with_loaded_tensors

    reference = resolve(options.model)
    dense = load_model(reference)
    measure = _recall if options.recall else _divergence
    figures = measure(reference, dense, options)
    folders = sorted((options.sweep / "plans").iterdir()) if options.sweep else []
    # Its own copy: the one to compare with keeps its states as they are.
    models = [("dense", reference.config, load_model(reference))]
    for folder in folders:
        if folder.name.startswith(tuple(options.only)):
            plan = with_loaded_tensors(read_plan(folder / "plan.json"), folder)
            models.append((folder.name, plan.config_after, _pruned(reference, plan)))
    for name, config, model in models:
        for states in FORMATS:
            with states.applied(model, reference):
                found = figures(model)
            record = {
                "model": name,
                "state_bytes": state_bytes(config, states.storage),
                "stored_states": states.record(),
                **found,
            }
            print(json.dumps(record), flush=True)
            yield record


def _divergence(reference: ModelReference, dense: Any, options: argparse.Namespace) -> Any:
    """What measures the KL from the dense model, and the documents that it is a mean over."""
    from launch.evaluation.fidelity import sum_divergences

    rows = _merged(_rows(reference, options))

    def figures(model: Any) -> dict[str, Any]:
        total, agreeing, tokens, documents = sum_divergences(model, dense, rows)
        count = len(documents.tokens)
        return {"kl": total / tokens, "agreement": agreeing / tokens, "documents": count}

    return figures


def _recall(reference: ModelReference, dense: Any, options: argparse.Namespace) -> Any:
    """What measures the share of values that are recalled, for each number of pairs."""
    from launch.evaluation.recall_score import accuracy
    from launch.evaluation.recall_tasks import mqar_examples
    from launch.recall import Options, encoder_of, task_of

    asked = Options(models=(options.model,), pairs=tuple(options.recall))
    task, encode = task_of(asked, reference), encoder_of(asked, reference)

    def figures(model: Any) -> dict[str, Any]:
        found = {
            pairs: accuracy(model, mqar_examples(task, pairs, options.examples, 0), encode, 64)
            for pairs in options.recall
        }
        return {"recall": found}

    return figures


def _pruned(reference: ModelReference, plan: Any) -> Any:
    import torch

    from pruning.transform.sliced_source import InMemory, SlicedSource
    from pruning.transform.slices import slices_of

    slices = slices_of(plan, reference.config)
    source = SlicedSource(reference.source(), slices, InMemory(plan.new_tensors))
    tensors = {name: source.read(name) for name in source.names()}
    return built(plan.config_after, tensors, torch.float32)


def _rows(reference: ModelReference, options: argparse.Namespace) -> list[Any]:
    given = HeldoutOptions(seq_len=options.seq_len, max_sequences=options.sequences, spread=True)
    text = heldout_text(reference, given)
    apart = keeps_documents_apart(reference.config)
    return list(text.sequences(vocabulary_size(reference.config), apart))


def _merged(rows: Sequence[Any]) -> list[Any]:
    """Rows of packed documents joined, so that fewer tokens come one after another."""
    import torch

    if any(set(row.inputs) != {"input", "cu_seqlens"} for row in rows):
        return list(rows)
    joined = []
    for first in range(0, len(rows), MERGED):
        some = rows[first : first + MERGED]
        bounds, start = [torch.zeros_like(some[0].inputs["cu_seqlens"][:1])], 0
        for row in some:
            bounds.append(row.inputs["cu_seqlens"][1:] + start)
            start += row.inputs["input"].shape[1]
        inputs = {
            "input": torch.cat([row.inputs["input"] for row in some], 1),
            "cu_seqlens": torch.cat(bounds),
        }
        labels, documents = (torch.cat([getattr(row, name) for row in some], -1)
                             for name in ("labels", "documents"))  # fmt: skip
        size = sum(row.bytes for row in some)
        joined.append(some[0]._replace(
            inputs=inputs, labels=labels, documents=documents, bytes=size))  # fmt: skip
    return joined


def _table(records: Sequence[dict[str, Any]]) -> Table:
    rows = []
    for record in records:
        recall = {f"{n} pairs": 100 * share for n, share in record.get("recall", {}).items()}
        stored = storage_text(record["stored_states"])
        rows.append({**record, "stored": stored, **recall})
    columns = [
        Column("model", "model", align="left"),
        Column("stored", "states stored as", align="left"),
        Column("state_bytes", "state bytes", ",d"),
        Column("kl", "KL, nats a token", ".5f"),
        *(Column(name, name, ".1f") for name in rows[0] if name.endswith(" pairs")),
    ]
    return Table([column for column in columns if column.key in rows[0]], rows)


def _chart(records: Sequence[dict[str, Any]], title: str) -> str:
    """An SVG with a line for each format, over the widths of the models that it was used with."""
    recalls = "recall" in records[0]
    lines = []
    for role, name in zip(SERIES, DRAWN, strict=False):
        of_format = [r for r in records if _short(storage_text(r["stored_states"])) == name]
        points = sorted((r["state_bytes"], _figure(r)) for r in of_format)
        # The dense model's distance from itself has no place on a logarithmic axis.
        points = [(x, y) for x, y in points if recalls or y > 1e-9]
        lines.append(Line(role, name, [x for x, _ in points], [y for _, y in points]))
    figures = [y for line in lines for y in line.y]
    sizes = [x for line in lines for x in line.x]

    def paint(figure: Any) -> None:
        ax = axes(figure, right=LEGEND)
        for line in lines:
            marks = {"color": line.colour, "lw": 1.5, "ms": 4, "clip_on": False}
            ax.plot(line.x, line.y, "o-", label=line.label, **marks)
        ax.set_xscale("log")
        ax.set_xlim(min(sizes) / 1.1, max(sizes) * 1.1)
        set_ticks(ax.xaxis, log_ticks(*ax.get_xlim()))
        if not recalls:
            ax.set_yscale("log")
            ax.set_ylim(min(figures) / 1.3, max(figures) * 1.3)
            set_ticks(ax.yaxis, log_ticks(*ax.get_ylim()))
        ax.set(xlabel="state bytes a sequence",
               ylabel="values recalled, %" if recalls else "KL, nats a token")  # fmt: skip
        ax.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, labelcolor="linecolor")

    return picture(title, paint)


def _figure(record: dict[str, Any]) -> float:
    """The KL, or the percentage of recalled values over all numbers of pairs."""
    if "recall" not in record:
        return record["kl"]
    shares = record["recall"].values()
    return 100 * sum(shares) / len(shares)


def _short(name: str) -> str:
    return name.replace(", a scale a ", "/").replace(" error feedback", "").replace(", ", "+")


if __name__ == "__main__":
    main()
