"""Stage `recall`: measure how many of the facts in its context a model gives back.

The tasks are multi-query associative recall (Zoology, arXiv 2312.04927) and a needle in a haystack,
both generated from a seed (`launch.evaluation.recall_tasks`).
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from flame.checkpoint.reference import ModelReference, resolve
from flame.data.mqar import Mqar, is_mqar, parse_mqar
from flame.errors import UserError
from flame.hugging_face.config_file import vocabulary_size
from flame.models.gpu_limits import check_dtype
from flame.options import argument, group, option
from flame.options.shared import DTYPE_HELP, DType
from flame.process.output_checks import check_file_output
from flame.recipe import data_config, read_tables
from flame.stage import Stage
from launch.evaluation.model_checks import check_family
from launch.evaluation.recall_tables import mqar_table, needle_table
from launch.evaluation.stored_states import STORED_STATES, StateOptions
from launch.reporting.envelope import command_line, enveloped, measuring, write_result

PAIRS = (4, 8, 16)
WORDS = 64
"""Least number of keys, and of values, where the tokenizer does not say how many there are."""


@dataclass(frozen=True)
class Options:
    models: tuple[str, ...] = argument("MODEL", "run, step or Hugging Face folder, or hub name")
    pairs: tuple[int, ...] = option(
        (),
        f"numbers of pairs to recall (default: the first model's recipe's, or {PAIRS})",
        least=1,
        metavar="N,N",
    )
    length: int | None = option(
        None, "words a document (default: the recipe's, or four a pair)", least=1, metavar="N"
    )
    needle: tuple[int, ...] = option(
        (), "words of haystacks to find a needle in (default: no needle)", least=8, metavar="N,N"
    )
    depths: tuple[int, ...] = option(
        (0, 50, 100), "percent of the haystack before the needle", least=0, most=100, metavar="P,P"
    )
    query_noise: bool = option(False, "measure also how each head amplifies noise in its queries")
    examples: int = option(256, "documents a figure", least=1, metavar="N")
    seed: int = option(0, "of everything random", least=0, metavar="N")
    batch: int = option(32, "documents at once", least=1, metavar="N")
    tokenizer: str = option("", "folder or hub name (default: the model's)", metavar="T")
    json: Path | None = option(None, "write the figures to FILE", metavar="FILE")
    dtype: DType = option("auto", DTYPE_HELP)
    states: StateOptions = group(StateOptions)
    overwrite: bool = option(False, "replace FILE if it exists")


def check(options: Options, world_size: int = 1) -> None:
    """Raise UserError if a model, its tokenizer, the task's sizes or the output cannot work."""
    references = [resolve(model) for model in options.models]
    if options.json is not None:
        for reference in references:
            check_file_output(options.json, options.overwrite, inside=reference.folder)
    options.states.check(references)
    task = task_of(options, references[0])
    for reference in references:
        _check_family(reference, options)
        check_dtype(reference.config, options.dtype)
        encode = encoder_of(options, reference)
        for word in (f"k{task.keys - 1}", f"v{task.values - 1}"):
            encode(word)


def run(options: Options) -> None:
    """Measure, print tables, write JSON. Collective; starts a process group if none is running."""
    from flame.process.distributed import process_group, rank

    with process_group(), measuring(options.json, options.overwrite):
        records = measure(options)
        if rank() == 0:
            _write(records, options)


def measure(options: Options) -> list[dict[str, Any]]:
    """Return a record for each model, in the order of the options. Collective.

    `mqar` has the accuracy of recalled values for each number of pairs, `needle` the accuracy for
    each length and depth. With `--query-noise`, `query_noise` has a record for each head.
    """
    task = task_of(options, resolve(options.models[0]))
    return [_measured(name, task, options) for name in options.models]


def _measured(name: str, task: Mqar, options: Options) -> dict[str, Any]:
    from flame.checkpoint.load import build_sharded
    from flame.process.distributed import compute_dtype, data_parallel_mesh, world_size
    from launch.evaluation.recall_score import accuracy
    from launch.evaluation.recall_tasks import mqar_examples, needle_examples
    from pruning.adapters import state_bytes

    reference = resolve(name)
    encode, dtype = encoder_of(options, reference), compute_dtype(options.dtype)
    model = build_sharded(reference, data_parallel_mesh(), dtype)
    score = partial(accuracy, model, encode=encode, batch_size=options.batch)
    numbers = options.examples, options.seed
    size = state_bytes(reference.config, options.states.storage)
    found: dict[str, Any] = {"model": name, "state_bytes": size}
    with options.states.applied(model, reference):
        found["mqar"] = [
            {"pairs": n, "accuracy": score(mqar_examples(task, n, *numbers))} for n in task.pairs
        ]
        found["needle"] = [
            {
                "length": length,
                "depth": depth,
                "accuracy": score(needle_examples(task, length, depth, encode, *numbers)),
            }
            for length in options.needle
            for depth in options.depths
        ]
    if options.query_noise:
        found["query_noise"] = _query_noise(model, reference, task, encode, options)
    return {
        **found,
        STORED_STATES: options.states.record(),
        "task": task.name,
        "examples": options.examples,
        "seed": options.seed,
        "dtype": str(dtype).removeprefix("torch."),
        "world_size": world_size(),
    }


def _query_noise(
    model: Any, reference: ModelReference, task: Mqar, encode: Any, options: Options
) -> list[dict[str, Any]]:
    """Return a record for each head, on one batch of the most pairs, the same on all ranks."""
    import torch

    from launch.evaluation.query_noise import query_noise
    from launch.evaluation.recall_score import answer_spans, token_rows
    from launch.evaluation.recall_tasks import mqar_examples

    examples = list(mqar_examples(task, max(task.pairs), options.batch, options.seed))
    tokens, lengths = token_rows(examples, encode)
    # The token before an answer is the one that asks for it.
    asked = [[begin - 1 for begin, _ in answer_spans(e, encode)] for e in examples]
    places = torch.tensor(asked, device=tokens.device)
    records = query_noise(model, reference.config, tokens, places, min(lengths))
    return [vars(record) for record in records]


def task_of(options: Options, reference: ModelReference) -> Mqar:
    """Return the task: sizes from the options, else from the model's recipe, else by default."""
    dataset = data_config(read_tables(reference.recipe)).dataset
    trained = parse_mqar(dataset) if is_mqar(dataset) else None
    sizes = encoder_of(options, reference).sizes
    known = tuple(n for n in PAIRS if sizes is None or n <= min(sizes))
    pairs = options.pairs or (trained.pairs if trained else known) or (1,)
    length = options.length or max(4 * max(pairs), trained.length if trained else 0)
    keys, values = sizes or (max(WORDS, max(pairs)),) * 2
    return Mqar(pairs=pairs, length=length, keys=keys, values=values)


def encoder_of(options: Options, reference: ModelReference) -> Any:
    """Return an encoder of words by the tokenizer; raise UserError if that is missing or unfit."""
    from flame.data.tokenizer import check_vocabulary, load_tokenizer
    from launch.evaluation.recall_score import WordEncoder

    folder = options.tokenizer or (str(reference.tokenizer) if reference.tokenizer else "")
    if not folder:
        raise UserError(f"{reference.folder} has no tokenizer: give --tokenizer FOLDER")
    tokenizer = load_tokenizer(folder)
    check_vocabulary(tokenizer, vocabulary_size(reference.config))
    return WordEncoder(tokenizer)


def _check_family(reference: ModelReference, options: Options) -> None:
    """Raise UserError for an unknown family or, with `--query-noise`, one without an adapter."""
    from pruning.adapters import ADAPTERS

    family = reference.config["model_type"]
    if options.query_noise and family not in ADAPTERS:
        raise UserError(
            f"{reference.folder} is of {family!r}: --query-noise needs a family whose states are "
            f"known, {', '.join(ADAPTERS)}"
        )
    check_family(reference.config)


def _write(records: list[dict[str, Any]], options: Options) -> None:
    stored = f"; states stored as {options.states.text()}" if options.states.state_dtype else ""
    print(f"recall of values, % right over {options.examples} documents{stored}")
    print(mqar_table(records).text())
    if options.needle:
        print(f"\nneedle in a haystack, % found\n{needle_table(records).text()}")
    if options.query_noise:
        _print_noise(records)
    if options.json is not None:
        models = {record["model"]: record for record in records}
        result = enveloped("recall", command_line("recall", options), {"models": models})
        write_result(options.json, result, options.overwrite, locked=True)


def _print_noise(records: list[dict[str, Any]]) -> None:
    from launch.evaluation import query_noise

    for record in records:
        heads = [query_noise.QueryNoise(**head) for head in record["query_noise"]]
        print(f"\nquery noise in {record['model']}\n{query_noise.table(heads).text()}", flush=True)


STAGE = Stage(
    "recall",
    "Measure associative recall, and retrieval of a needle from a haystack.",
    Options,
    run,
    check,
)

if __name__ == "__main__":
    STAGE.main()
