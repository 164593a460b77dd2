"""Stage `eval`: measure the perplexity of models, their scores in tasks, and their fidelity.

It prints one table. With `--json` it saves each model's record as soon as it is measured, and a
second call measures only what is missing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flame.checkpoint.reference import ModelReference, resolve, vocabulary_size
from flame.errors import UserError
from flame.options import argument, group, option
from flame.stage import Stage
from launch.drawing.table import Column, Table
from launch.evaluation.heldout_text import check_text, heldout_text
from launch.evaluation.measures import Measures, evaluate_models, loaded_tasks
from launch.evaluation.model_checks import check_family, check_length, check_tokenizer, expanded
from launch.evaluation.results_file import ResultsFile
from launch.lm.tasks import check_tasks, headline
from launch.reporting.envelope import command_line

COLUMNS = (
    Column("model", "model", align="left"),
    Column("perplexity", "perplexity", ",.4f"),
    Column("bits_per_byte", "bits per byte", ".4f"),
    Column("tokens", "tokens", ",d"),
)
SIZES = (
    Column("parameters", "parameters", ",d"),
    Column("state_bytes", "state bytes", ",d"),
)
FIDELITY = (
    Column("kl", "KL (nats)", ".4f"),
    Column("agreement", "top-1 agreement", ".4f"),
)


@dataclass(frozen=True)
class Options:
    models: tuple[str, ...] = argument(
        "MODEL",
        "run folder, step folder, Hugging Face folder or hub name; quoted, 'RUN/checkpoint/*' is "
        "every step of a run",
    )
    measures: Measures = group(Measures)
    json: Path | None = option(None, "keep the figures in FILE; resumes from it", metavar="FILE")
    overwrite: bool = option(False, "replace FILE if it exists")

    @property
    def names(self) -> list[str]:
        """The models, patterns expanded; raises UserError for a pattern that matches nothing."""
        return expanded(self.models)


def check(options: Options, world_size: int = 1) -> None:
    """Raise UserError if a model, the text, a tokenizer, a task or the output cannot work."""
    measures = options.measures
    if measures.perplexity is None and not measures.tasks.tasks and not measures.against:
        raise UserError(
            "say what to measure: --perplexity or --perplexity DATA, --tasks NAMES, --against MODEL"
        )
    references = [resolve(name) for name in options.names]
    dense = [resolve(measures.against)] if measures.against else []
    _results(options).check([reference.folder for reference in [*references, *dense]])
    for reference in references:
        _check_model(reference, measures)
    for other in dense:
        from launch.evaluation.fidelity import check_comparable

        check_family(other.config)
        for reference in references:
            check_comparable(reference, other)
    if measures.tasks.tasks:
        check_tasks(measures.tasks)
        loaded_tasks(measures.tasks)


def run(options: Options) -> None:
    """Evaluate and print a table. Collective; starts a process group if none is running."""
    from flame.process.distributed import process_group, rank

    results = _results(options)
    with process_group():
        if rank() == 0:
            results.check()
        records = evaluate_models(options.names, options.measures, results)
        if rank() == 0:
            print(table(records).text(), flush=True)


def table(records: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return a table with a row for each model and a column for each figure that any model has."""
    rows = [
        {**record, **record.get("fidelity", {}), **_scores(record), "model": name}
        for name, record in records.items()
    ]
    scored = dict.fromkeys(key for record in records.values() for key in _scores(record))
    columns = [*COLUMNS[1:], *FIDELITY, *(Column(key) for key in scored), *SIZES]
    used = [column for column in columns if any(row.get(column.key) is not None for row in rows)]
    return Table([COLUMNS[0], *used], rows)


def _scores(record: Mapping[str, Any]) -> dict[str, str]:
    tasks = record.get("tasks", {})
    return headline({**tasks.get("results", {}), **tasks.get("groups", {})})


def _results(options: Options) -> ResultsFile:
    return ResultsFile(
        path=options.json,
        settings=options.measures.settings(),
        several=len(options.names) > 1,
        command=command_line("eval", options),
        overwrite=options.overwrite,
    )


def _check_model(reference: ModelReference, measures: Measures) -> None:
    text = None
    if measures.perplexity is not None or measures.against:
        text = heldout_text(reference, measures.text)
    check_family(reference.config)
    check_length(reference.config, measures.max_length)
    if text is not None:
        vocabulary = vocabulary_size(reference.config)
        check_text(text, vocabulary, from_recipe=not measures.text.data)
    if measures.tasks.tasks:
        check_tokenizer(reference, measures.text.tokenizer)


STAGE = Stage(
    "eval",
    "Measure models: perplexity, tasks, and fidelity to another model.",
    Options,
    run,
    check,
)

if __name__ == "__main__":
    STAGE.main()
