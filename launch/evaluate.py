"""Stage `eval`: perplexity, lm-eval's tasks, and fidelity to a dense model, of any references.

    slimstate eval MODEL … --perplexity [DATA] --tasks a,b --against DENSE [--json FILE]

or the same arguments after `torchrun … -m launch.evaluate`. One table comes out. With `--json` each
model's record is kept as soon as it is there, and a second call measures only what is missing.
"""

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flame.checkpoint.reference import vocabulary_size
from flame.errors import UserError, run_command
from launch.drawing.table import Column, Table
from launch.evaluation.heldout_text import HeldoutOptions, check_text, heldout_text
from launch.evaluation.measures import (
    Measures,
    check_length,
    check_tokenizer,
    evaluate_models,
    expanded,
    loaded_tasks,
)
from launch.evaluation.perplexity import DTYPES
from launch.evaluation.results_file import ResultsFile
from launch.lm.tasks import TaskOptions, check_tasks, headline

PLACEMENTS = ("auto", "whole", "sharded")

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
    models: tuple[str, ...]
    measures: Measures
    json: Path | None = None
    overwrite: bool = False


def parse(argv: list[str] | None = None) -> Options:
    """Options from a command line."""
    parser = argparse.ArgumentParser(
        prog="slimstate eval",
        description="Measure models: perplexity, tasks, and fidelity to another model.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "models",
        nargs="+",
        metavar="MODEL",
        help="run folder, step folder, Hugging Face folder or hub name; quoted, 'RUN/checkpoint/*' "
        "is every step of a run",
    )
    add(
        "--perplexity",
        nargs="?",
        const="",
        metavar="DATA",
        help="held-out perplexity on DATA: hub name, file or folder (default: the recipe's)",
    )
    add("--tasks", default="", metavar="A,B", help="lm-eval's tasks, or those of --task-path")
    add("--task-path", type=Path, metavar="DIR", help="folder with task files of your own")
    add("--limit", type=int, metavar="N", help="documents of each task (default: all)")
    add("--num-fewshot", type=int, metavar="N", help="examples before each question")
    add("--against", default="", metavar="MODEL", help="KL and top-1 agreement with MODEL")
    add("--json", type=Path, metavar="FILE", help="keep the figures in FILE; resumes from it")
    add("--seq-len", type=int, metavar="N", help="tokens a row (default: the recipe's, or 2048)")
    add("--max-sequences", type=int, metavar="N", help="rows to read (default: all)")
    add("--tokenizer", default="", metavar="T", help="folder or hub name (default: the model's)")
    add("--subset", default="", help="configuration of a hub data set")
    add("--split", default="", help="split of DATA")
    add("--text-key", default="", help="column of DATA that holds the text (default: text)")
    add("--dtype", choices=DTYPES, default="auto", help="compute dtype; auto: bfloat16 on CUDA")
    add("--batch", type=int, default=32, metavar="N", help="sequences of tasks a pass, at most")
    add("--max-length", type=int, metavar="N", help="tokens that tasks show the model at once")
    add(
        "--placement",
        choices=PLACEMENTS,
        default="auto",
        help="the model on each process whole, or sharded over all (auto: whole where it fits)",
    )
    add("--overwrite", action="store_true", help="replace FILE if it exists")
    return _options(parser.parse_args(argv))


def check(options: Options, world_size: int = 1) -> None:
    """Refuse what cannot work: a model, the text, a tokenizer, a task, the output."""
    from flame.checkpoint.reference import resolve

    measures = options.measures
    _check_numbers(measures)
    references = [resolve(name) for name in options.models]
    dense = [resolve(measures.against)] if measures.against else []
    _results(options).check([reference.folder for reference in [*references, *dense]])
    for reference in references:
        _check_model(reference, measures)
    for reference in dense:
        _check_family(reference.config)
        _check_comparable(references, reference)
    if measures.tasks is not None and _is_rank_zero():
        check_tasks(measures.tasks)
        loaded_tasks(measures.tasks)


def run(options: Options) -> None:
    """Evaluate, print a table, keep JSON. Collective; inside a process group, or starting one."""
    from flame.process.distributed import process_group, rank

    results = _results(options)
    with process_group():
        if rank() == 0:
            results.check()
        records = evaluate_models(options.models, options.measures, results)
        if rank() == 0:
            print(table(records).text(), flush=True)


def table(records: Mapping[str, Mapping[str, Any]]) -> Table:
    """One row a model; columns for what was measured of any."""
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


def _options(values: argparse.Namespace) -> Options:
    names = tuple(name.strip() for name in values.tasks.split(",") if name.strip())
    if values.perplexity is None and not names and not values.against:
        raise UserError(
            "say what to measure: --perplexity or --perplexity DATA, --tasks NAMES, --against MODEL"
        )
    text = HeldoutOptions(
        data=values.perplexity or "",
        subset=values.subset,
        split=values.split,
        text_key=values.text_key,
        tokenizer=values.tokenizer,
        seq_len=values.seq_len,
        max_sequences=values.max_sequences,
    )
    tasks = TaskOptions(names, values.task_path, values.limit, values.num_fewshot)
    measures = Measures(
        perplexity=values.perplexity is not None,
        against=values.against,
        tasks=tasks if names else None,
        text=text,
        dtype=values.dtype,
        placement=values.placement,
        batch=values.batch,
        max_length=values.max_length,
    )
    return Options(tuple(expanded(values.models)), measures, values.json, values.overwrite)


def _results(options: Options) -> ResultsFile:
    settings = options.measures.settings()
    return ResultsFile(options.json, settings, len(options.models) > 1, options.overwrite)


def _check_numbers(measures: Measures) -> None:
    values = {
        "--seq-len": measures.text.seq_len,
        "--max-sequences": measures.text.max_sequences,
        "--batch": measures.batch,
        "--max-length": measures.max_length,
    }
    for option, value in values.items():
        if value is not None and value < 1:
            raise UserError(f"{option} is {value}: it must be at least 1")


def _check_model(reference: Any, measures: Measures) -> None:
    text = None
    if measures.perplexity or measures.against:
        text = heldout_text(reference, measures.text)
    _check_family(reference.config)
    check_length(reference.config, measures.max_length)
    if not _is_rank_zero():
        return
    if text is not None:
        from_recipe = not measures.text.data
        check_text(text, vocabulary_size(reference.config), from_recipe=from_recipe)
    if measures.tasks is not None:
        check_tokenizer(reference, measures.text.tokenizer)


def _check_comparable(references: list[Any], dense: Any) -> None:
    from launch.evaluation.fidelity import check_comparable

    for reference in references:
        check_comparable(reference, dense)


def _check_family(config: dict[str, Any]) -> None:
    """Refuse an unknown family. Known ones pass without the seconds that importing fla takes."""
    from pruning.adapters import ADAPTERS

    if config["model_type"] not in ADAPTERS:
        from flame.model import stock_config

        stock_config(config)


def _is_rank_zero() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def main(argv: list[str] | None = None) -> None:
    """Parse, check and run; a `UserError` ends in one line and exit status 1."""
    run_command(parse, check, run, argv)


if __name__ == "__main__":
    main()
