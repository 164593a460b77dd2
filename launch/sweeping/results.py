"""The results of a sweep, put together from the records of its points."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from flame.checkpoint.reference import resolve
from flame.errors import UserError
from launch.evaluation.heldout_text import HeldoutText
from launch.reporting.envelope import command_line, enveloped
from launch.sweeping.comparison.figures import ModelPoints, compare, points_of
from launch.sweeping.comparison.page import write_comparison
from launch.sweeping.comparison.tables import grids
from launch.sweeping.folder import PAGE_FILE, Record
from launch.sweeping.options import Options
from launch.sweeping.page import write_files
from launch.sweeping.tables import collect_rows, sweep_of, without_documents
from launch.sweeping.work import CONTINUED, DENSE


def write_results(options: Options, texts: Sequence[HeldoutText]) -> None:
    """Write and print the results; raise UserError if points failed."""
    models = []
    for member, text in zip(options.members, texts, strict=True):
        records = _records(member)
        models.append(_model_points(options, member, records))
        results = enveloped("sweep", _command(options), _results(member, text, records, models[-1]))
        write_files(member.out, results, None if options.models else options.json)
    if options.models:
        results = enveloped("comparison", _command(options), _comparison(options, texts, models))
        write_comparison(options.out, results, options.json)
    else:
        for table in sweep_of(results).tables():
            print(f"\n{table.text()}")
        for note in dict.fromkeys(note for row in results["rows"] for note in row["notes"]):
            print(f"note: {note}")
    for grid in grids(results["comparison"]):
        print(f"\n{grid.heading}\n{grid.table.text()}")
    print(f"\n{options.out / PAGE_FILE} shows it; results.* beside it have it", flush=True)
    _raise_failures(options)


def _raise_failures(options: Options) -> None:
    """Raise UserError if points failed in this run."""
    found = [(member, name) for member in options.members for name in member.wanted]
    failed = [(m, name) for m, name in found if m.folder.failure(name) is not None]
    if failed:
        logs = ", ".join(dict.fromkeys(str(member.out / "logs") for member, _ in failed))
        raise UserError(
            f"{len(failed)} of {len(found)} points failed ({', '.join(n for _, n in failed)}): "
            f"what they said is in {logs}; run again to repeat them"
        )


def _records(member: Options) -> dict[str, Record]:
    found = {name: member.folder.record(name) for name in member.wanted}
    return {name: record for name, record in found.items() if record is not None}


def _controls(records: Mapping[str, Record]) -> dict[str, Record]:
    return {
        "before": records.get(DENSE, {}).get("before", {}),
        "recovered": records.get(CONTINUED, {}).get("recovered", {}),
    }


def _model_points(options: Options, member: Options, records: Mapping[str, Record]) -> ModelPoints:
    groups = {options.out / each.name: each.group for each in options.models}
    group = groups.get(member.out, member.model)
    return points_of(member.out.name, group, member.points, records, _controls(records))


def _command(options: Options) -> str:
    """The command line, as it was given where it names a file."""
    if options.models:
        return shlex.join(["slimstate", "sweep", *options.given])
    return command_line("sweep", options)


def _results(
    options: Options, text: HeldoutText, records: Mapping[str, Record], model: ModelPoints
) -> dict[str, Any]:
    """Return the results of one model as `launch.sweeping.page` writes and reads them."""
    controls = _controls(records)
    dense = controls["before"]
    return {
        "title": options.title or f"slimstate sweep: {options.model}",
        "model": options.model,
        "weights": str(resolve(options.model).weights),
        "ratios": list(options.ratios),
        "controls": {stage: control.get("perplexity") for stage, control in controls.items()},
        "rows": collect_rows(options.points, records, controls),
        "comparison": compare([model], options.reference),
        "points": {name: without_documents(record) for name, record in records.items()},
        "facts": {
            "held-out text": text.name,
            "tokens predicted": dense.get("tokens"),
            **_facts(options, text, [records]),
        },
    }


def _comparison(
    options: Options, texts: Sequence[HeldoutText], models: Sequence[ModelPoints]
) -> dict[str, Any]:
    """Return the results of several models as `launch.sweeping.comparison.page` takes them."""
    records = [_records(member) for member in options.members]
    return {
        "title": options.title or f"slimstate sweep: {options.config}",
        "models": [vars(each) for each in options.models],
        "perplexity": {
            model.name: {stage: each.get("perplexity") for stage, each in _controls(own).items()}
            for model, own in zip(models, records, strict=True)
        },
        "reference": list(options.reference),
        "comparison": compare(models, options.reference),
        "facts": {
            "held-out text": ", ".join(dict.fromkeys(text.name for text in texts)),
            **_facts(options, texts[0], records),
        },
    }


def _facts(
    options: Options, text: HeldoutText, records: Sequence[Mapping[str, Record]]
) -> dict[str, Any]:
    seconds = (sum(record["seconds"].values()) for own in records for record in own.values())
    documents = _controls(records[0])["before"].get("documents", {}).get("tokens", ())
    return {
        "documents": len(documents),
        "tokens a row": text.seq_len,
        **({"recovery": options.recover.name} if options.recover else {}),
        "seconds of all points": round(sum(seconds)),
    }
