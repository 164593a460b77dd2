"""Stage `analyze`: the rank of a model's recurrent states, by layer, head and time.

`slimstate analyze MODEL OUT --data DATA --length 2048`, or the same arguments after
`torchrun … -m launch.analyze`. `--against MODEL` measures another model on the same text, a dense
one beside its pruned form; `--second-data DATA` the same model on another text. OUT gets
`analysis.parquet`, `summary.json` and plots as SVG.

A sequence is one stretch of text: where documents are packed into it the state runs on, so that a
time is a number of tokens since the state was empty.
"""

import argparse
import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flame.checkpoint.reference import vocabulary_size
from flame.errors import UserError, run_command
from flame.recipe import data_config, read_tables
from flame.versions import versions
from launch.drawing.table import Table
from launch.evaluation.heldout_text import HeldoutOptions, HeldoutText, heldout_text
from launch.ranks.analysis_files import compared, layer_means, model_summary, write_analysis
from launch.ranks.rank_plots import NAMES, Series, plots
from launch.reporting.tables import RANK_COLUMNS

if TYPE_CHECKING:
    from torch import Tensor

    from flame.checkpoint.reference import ModelReference
    from pruning.states.analysis import Analysis

LENGTH = 2048
"""Tokens a sequence, as in arXiv 2602.04852 and 2602.02195."""

SEQUENCES = 4

EPSILON = 1e-4


@dataclass(frozen=True)
class Options:
    model: str
    out: Path
    text: HeldoutOptions
    second: HeldoutOptions | None = None
    """The text of `--second-data`."""
    against: str = ""
    """Another model; empty for none."""
    metric: str = "stable_rank"
    """What ranks the heads in the plots."""
    epsilon: float = EPSILON
    per_octave: int = 2
    """Times measured for each doubling of the tokens."""
    overwrite: bool = False


def parse(argv: list[str] | None = None) -> Options:
    """Options from a command line."""
    parser = argparse.ArgumentParser(
        prog="slimstate analyze",
        description="Measure the rank of a model's recurrent states over time.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="run folder, step folder, Hugging Face folder or hub name")
    add("out", metavar="OUT", type=Path, help="folder to write")
    add("--data", default="", help="hub name, file or folder (default: the recipe's held-out text)")
    add("--length", type=int, default=LENGTH, metavar="N", help="tokens (default: %(default)s)")
    add("--sequences", type=int, default=SEQUENCES, metavar="N", help="default: %(default)s")
    add("--against", default="", metavar="MODEL", help="another model, such as the dense one")
    add("--second-data", default="", metavar="DATA", help="another text for MODEL")
    add("--second-split", default="", metavar="SPLIT", help="split of the second text")
    add("--metric", default="stable_rank", help=f"rank to plot: {', '.join(NAMES)}")
    add("--epsilon", type=float, default=EPSILON, help="of the threshold rank (%(default)s)")
    add("--per-octave", type=int, default=2, metavar="N", help="times a doubling (%(default)s)")
    add("--tokenizer", default="", metavar="T", help="folder or hub name (default: the model's)")
    add("--subset", default="", help="configuration of a hub data set")
    add("--split", default="", help="split of DATA")
    add("--text-key", default="", help="column of DATA that holds the text (default: text)")
    add("--overwrite", action="store_true", help="replace OUT if it exists")
    return _options(parser.parse_args(argv))


def check(options: Options, world_size: int = 1) -> None:
    """Refuse what cannot work: numbers, models, texts, the output."""
    from flame.checkpoint.reference import check_destination
    from pruning.states.analysis import linear_spaces

    _check_numbers(options)
    references = _references(options)
    for reference in references:
        check_destination(reference, options.out, options.overwrite)
        linear_spaces(reference.config)
    if int(os.environ.get("RANK", "0")) == 0:
        for text in _texts(options, references[0]):
            _rows(text, references)


def run(options: Options) -> None:
    """Analyse, print a table, write OUT. Collective; inside a process group, or starting one."""
    from flame.process.distributed import process_group
    from flame.process.peers import on_first

    with process_group():
        references = _references(options)
        texts = _texts(options, references[0])
        analyses = _analyse(options, references, texts)
        on_first(lambda: _write(options, references, texts, analyses))


def _analyse(
    options: Options, references: "list[ModelReference]", texts: list[HeldoutText]
) -> "list[Analysis]":
    """The model on the first text, then what was asked for of the other model and text."""
    from pruning.state_rank import token_counts
    from pruning.states.analysis import analyse_states

    counts = token_counts(texts[0].seq_len, options.per_octave)
    rows = [_rows(text, references) for text in texts]
    found = [analyse_states(model, rows[0], counts, options.epsilon) for model in references]
    found += [analyse_states(references[0], more, counts, options.epsilon) for more in rows[1:]]
    return found


def _write(
    options: Options,
    references: "list[ModelReference]",
    texts: list[HeldoutText],
    analyses: "list[Analysis]",
) -> None:
    from flame.process.atomic_output import replacing_folder

    given = [options.model, options.against]
    labels = [_label(name, reference) for name, reference in zip(given, references, strict=False)]
    models = _distinct(labels, [str(reference.weights) for reference in references])
    names = _distinct([Path(text.name).name for text in texts], [text.name for text in texts])
    model, *rest = analyses
    against = rest.pop(0) if options.against else None
    second = rest.pop(0) if options.second else None
    table = {(models[0], names[0]): model}
    summary = _facts(options, references, texts) | {"model": model_summary(model)}
    if against is not None:
        table[(models[1], names[0])] = against
        summary["against"] = model_summary(against)
        summary["over_models"] = compared(model, against)
    if second is not None:
        table[(models[0], names[1])] = second
        summary["second_data"] = model_summary(second)
        summary["over_data"] = compared(model, second)
    drawn = plots(
        Series(models[0], model),
        options.metric,
        None if against is None else Series(models[1], against, "dense"),
        None if second is None else (names[0], Series(names[1], second)),
    )
    with replacing_folder(options.out, options.overwrite) as temporary:
        write_analysis(temporary, table, summary, drawn)
    shown = {models[0]: model} | ({models[1]: against} if against is not None else {})
    print(_table(shown).text(), flush=True)
    print(_sentence(summary["model"]["groups"], options.metric), flush=True)


def _table(analyses: "dict[str, Analysis]") -> Table:
    rows = [
        {"model": label, **row}
        for label, analysis in analyses.items()
        for row in layer_means(analysis)
    ]
    return Table(RANK_COLUMNS, rows)


def _sentence(groups: dict[str, Any], metric: str) -> str:
    """What the split of the heads says of itself."""
    rank = metric if metric in groups else "stable_rank"
    found = groups[rank]
    if not found["high_heads"]:
        return f"All heads have the same {NAMES[rank]}: there are no two groups."
    return (
        f"By {NAMES[rank]}, {found['low_heads']} heads lie below {found['bound']:.3g} and "
        f"{found['high_heads']} above; the groups hold {found['separation']:.0%} of the variance "
        "(75% would for ranks spread evenly)."
    )


def _facts(
    options: Options, references: "list[ModelReference]", texts: list[HeldoutText]
) -> dict[str, Any]:
    """What was measured on what, for the summary."""
    from launch.ranks.analysis_files import FORMAT

    first, *others = references
    return {
        "format": FORMAT,
        "model_reference": str(first.weights),
        "against_reference": str(others[0].weights) if others else None,
        "data": [text.name for text in texts],
        "length": texts[0].seq_len,
        "sequences": texts[0].max_sequences,
        "epsilon": options.epsilon,
        "metric": options.metric,
        "versions": versions(),
    }


def _options(values: argparse.Namespace) -> Options:
    text = HeldoutOptions(
        data=values.data,
        subset=values.subset,
        split=values.split,
        text_key=values.text_key,
        tokenizer=values.tokenizer,
        seq_len=values.length,
        max_sequences=values.sequences,
    )
    second = dataclasses.replace(
        text, data=values.second_data, split=values.second_split, subset="", text_key=""
    )
    if values.second_split and not values.second_data:
        raise UserError("--second-split needs --second-data")
    return Options(
        model=values.model,
        out=values.out,
        text=text,
        second=second if values.second_data else None,
        against=values.against,
        metric=values.metric,
        epsilon=values.epsilon,
        per_octave=values.per_octave,
        overwrite=values.overwrite,
    )


def _check_numbers(options: Options) -> None:
    numbers = {
        "--length": options.text.seq_len,
        "--sequences": options.text.max_sequences,
        "--per-octave": options.per_octave,
    }
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}: it must be at least 1")
    if not 0 < options.epsilon < 1:
        raise UserError(f"--epsilon is {options.epsilon}: it must lie between 0 and 1")
    if options.metric not in NAMES:
        raise UserError(f"unknown metric {options.metric!r}: choose from {', '.join(NAMES)}")


def _references(options: Options) -> "list[ModelReference]":
    from flame.checkpoint.reference import resolve

    return [resolve(name) for name in (options.model, options.against) if name]


def _texts(options: Options, reference: "ModelReference") -> list[HeldoutText]:
    trained_on = data_config(read_tables(reference.recipe))
    named = trained_on.heldout or trained_on.dataset or trained_on.sources
    if not (options.text.data or named):
        raise UserError(f"{reference.folder} has no recipe that names held-out text: give --data")
    wanted = [options.text, *([options.second] if options.second else [])]
    return [heldout_text(reference, text) for text in wanted]


def _rows(text: HeldoutText, references: "list[ModelReference]") -> "list[Tensor]":
    """The sequences, int64 [1, length] each; UserError if the text is too short for them."""
    size = min(vocabulary_size(reference.config) for reference in references)
    rows = [inputs["input"] for inputs, _, _ in text.sequences(size, apart=False)]
    whole = [row for row in rows if row.shape[1] == text.seq_len]
    wanted = text.max_sequences or 1
    if len(whole) < wanted:
        raise UserError(
            f"{text.name} has {sum(row.shape[1] for row in rows):,} tokens, and --sequences "
            f"{wanted} of --length {text.seq_len} need {wanted * text.seq_len:,}: give longer "
            "text, or ask for less"
        )
    return whole


def _label(given: str, reference: "ModelReference") -> str:
    """The run's name, or the model's on the hub, whose folder is named by a hash."""
    return reference.folder.name if Path(given).expanduser().exists() else Path(given).name


def _distinct(labels: list[str], full: list[str]) -> list[str]:
    """`labels`, or `full` where two labels are the same."""
    return labels if len(set(labels)) == len(labels) else full


def main(argv: list[str] | None = None) -> None:
    """Parse, check and run; a `UserError` ends in one line and exit status 1."""
    run_command(parse, check, run, argv)


if __name__ == "__main__":
    main()
