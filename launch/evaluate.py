"""Stage `eval`: measure the perplexity of models, their scores in tasks, and their fidelity.

It prints one table. With `--json` it saves each model's record as soon as it is measured, and a
second call measures only what is missing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flame.checkpoint.reference import ModelReference, resolve
from flame.errors import UserError
from flame.models.gpu_limits import check_dtype
from flame.options import argument, group, option
from flame.process.environment import is_dry_run
from flame.stage import Stage
from launch.drawing.table import Column, Table
from launch.evaluation.intervals import differences
from launch.evaluation.measures import Measures, evaluate_models, loaded_tasks
from launch.evaluation.model_checks import (
    check_family,
    check_length,
    check_same_length,
    check_tokenizer,
    expanded,
)
from launch.evaluation.results_file import ResultsFile
from launch.evaluation.same_text import check_same_tokens, same_text
from launch.lm.tasks import check_tasks, headline
from launch.reporting.envelope import command_line, measuring

COLUMNS = (
    Column("model", "model", align="left"),
    Column("perplexity", "perplexity", ",.4f"),
    Column("error", "±", ",.4f"),
    Column("rise", "nats above the first [95 %]"),
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

    @property
    def found(self) -> dict[str, ModelReference]:
        """The models by name; raises UserError for one that is not there."""
        return {name: resolve(name, given=self.measures.given) for name in self.names}


def check(options: Options, world_size: int = 1) -> None:
    """Raise UserError if a model, the text, a tokenizer, a task or the output cannot work."""
    measures = options.measures
    if measures.perplexity is None and not measures.tasks.tasks and not measures.against:
        raise UserError(
            "say what to measure: --perplexity or --perplexity DATA, --tasks NAMES, --against MODEL"
        )
    by_name = options.found
    references = list(by_name.values())
    for reference in references:
        _check_model(reference, measures)
        check_dtype(reference.config, measures.dtype)
    measures.states.check(references)
    if measures.reads_text:
        text = same_text(by_name, measures.text)
        check_same_tokens(by_name, text, from_recipe=not measures.text.data)
    dense = [resolve(measures.against, given=measures.given)] if measures.against else []
    measures.given.check_needed([*references, *dense])
    _results(options).check([reference.folder for reference in [*references, *dense]])
    for other in dense:
        from launch.evaluation.fidelity import check_comparable

        check_family(other.config)
        for reference in references:
            check_comparable(reference, other)
    if measures.tasks.tasks:
        check_tasks(measures.tasks)
        if not is_dry_run():
            # This runs what the task files name by `!function`.
            measures.states.check_tasks(loaded_tasks(measures.tasks))
        if len(by_name) > 1 and measures.max_length is None:
            check_same_length(by_name, measures.text.tokenizer)


def run(options: Options) -> None:
    """Evaluate and print a table. Collective; starts a process group if none is running."""
    from flame.process.distributed import process_group, rank
    from flame.process.peers import on_first

    results = _results(options)
    with process_group(), measuring(options.json):
        on_first(results.check)
        records = evaluate_models(options.names, options.measures, results)
        if rank() == 0:
            print(table(records).text(), flush=True)
            if options.measures.states.state_dtype:
                print(f"\nstates stored after each token: {options.measures.states.text()}")


def table(records: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return a table with a row for each model and a column for each figure that any model has."""
    rises = {name: found.text() for _, name, found in differences(records)}
    rows = [
        {
            **record,
            **record.get("fidelity", {}),
            **_scores(record),
            "model": name,
            "rise": rises.get(name),
        }
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
        settings=options.measures.settings(options.found),
        several=len(options.names) > 1,
        command=command_line("eval", options),
        overwrite=options.overwrite,
    )


def _check_model(reference: ModelReference, measures: Measures) -> None:
    check_family(reference.config)
    check_length(reference.config, measures.max_length)
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
