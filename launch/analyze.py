"""Stage `analyze`: measure the rank of a model's recurrent states by layer, head and time.

OUT gets `analysis.parquet`, `summary.json` and plots as SVG. A sequence is one stretch of text: the
state is not reset between the documents packed into it. A time is the number of tokens read since
the state was empty.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flame.errors import UserError
from flame.hugging_face.config_file import vocabulary_size
from flame.options import argument, group, option
from flame.recipe import data_config, read_tables
from flame.stage import Stage
from launch.drawing.table import Table
from launch.evaluation.heldout_text import HeldoutOptions, HeldoutText, heldout_text
from launch.ranks.analysis_files import compared, layer_means, model_summary, write_analysis
from launch.ranks.precision import precision_sentence
from launch.ranks.rank_plots import NAMES, Series, plots
from launch.reporting.envelope import command_line, enveloped
from launch.reporting.tables import RANK_COLUMNS

if TYPE_CHECKING:
    from torch import Tensor

    from flame.checkpoint.reference import ModelReference
    from pruning.states.analysis import Analysis


@dataclass(frozen=True)
class Options:
    model: str = argument("MODEL", "run folder, step folder, Hugging Face folder or hub name")
    out: Path = argument("OUT", "folder to write")
    against: str = option("", "another model, such as the dense one", metavar="MODEL")
    # As many tokens as in arXiv 2602.04852 and 2602.02195.
    length: int = option(2048, "tokens a sequence", least=1, metavar="N")
    sequences: int = option(4, "sequences to read", least=1, metavar="N")
    rows: HeldoutOptions = group(HeldoutOptions, without=("seq_len", "max_sequences", "spread"))
    second_data: str = option("", "another text for MODEL", metavar="DATA")
    second_split: str = option("", "split of the second text", metavar="SPLIT")
    metric: str = option(
        "stable_rank",
        f"rank that orders the heads in the plots: {', '.join(NAMES)}",
        choices=tuple(NAMES),
        metavar="RANK",
    )
    epsilon: float = option(1e-4, "threshold of the threshold rank", above=0, below=1)
    per_octave: int = option(
        2, "times measured for each doubling of the tokens", least=1, metavar="N"
    )
    overwrite: bool = option(False, "replace OUT if it exists and slimstate made it")

    @property
    def texts(self) -> list[HeldoutOptions]:
        """The text, and the second one if it is asked for."""
        first = replace(self.rows, seq_len=self.length, max_sequences=self.sequences)
        if not self.second_data:
            return [first]
        second = replace(first, data=self.second_data, split=self.second_split)
        return [first, replace(second, subset="", text_key="")]


def check(options: Options, world_size: int = 1) -> None:
    """Raise UserError if a model, a text, an option or the output cannot work."""
    from flame.checkpoint.reference import check_destination
    from pruning.states.analysis import linear_spaces

    if options.second_split and not options.second_data:
        raise UserError("--second-split needs --second-data")
    references = _references(options)
    for reference in references:
        check_destination(reference, options.out, options.overwrite)
        linear_spaces(reference.config)
    for text in _texts(options, references[0]):
        _rows(text, references)


def run(options: Options) -> None:
    """Analyse, print a table, write OUT. Collective; starts a process group if none is running."""
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
    """Return analyses of the model, of the other model, and of the model on the second text.

    Those that were not asked for are left out.
    """
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
    """Write OUT, then print the table and a sentence about the two groups of heads."""
    from flame.process.atomic_output import replacing_folder

    given = [options.model, options.against]
    labels = [_label(name, reference) for name, reference in zip(given, references, strict=False)]
    models = _distinct(labels, [str(reference.weights) for reference in references])
    names = _distinct([Path(text.name).name for text in texts], [text.name for text in texts])
    model, *rest = analyses
    against = rest.pop(0) if options.against else None
    second = rest.pop(0) if options.second_data else None
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
    result = enveloped("analyze", command_line("analyze", options), summary)
    with replacing_folder(options.out, options.overwrite) as temporary:
        write_analysis(temporary, table, result, drawn)
    shown = {models[0]: model} | ({models[1]: against} if against is not None else {})
    print(_table(shown).text(), flush=True)
    print(_sentence(summary["model"]["groups"], options.metric), summary["precision"], flush=True)


def _table(analyses: "dict[str, Analysis]") -> Table:
    rows = [
        {"model": label, **row}
        for label, analysis in analyses.items()
        for row in layer_means(analysis)
    ]
    return Table(RANK_COLUMNS, rows)


def _sentence(groups: dict[str, Any], metric: str) -> str:
    """Say in one sentence how the heads split into two groups by rank."""
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
    """Return what the summary says about the models, texts and settings."""
    from flame.process.distributed import compute_dtype, device_type

    first, *others = references
    return {
        "model_reference": str(first.weights),
        "against_reference": str(others[0].weights) if others else None,
        "data": [text.name for text in texts],
        "length": texts[0].seq_len,
        "sequences": texts[0].max_sequences,
        "epsilon": options.epsilon,
        "metric": options.metric,
        "precision": precision_sentence(str(compute_dtype()).removeprefix("torch."), device_type()),
    }


def _references(options: Options) -> "list[ModelReference]":
    from flame.checkpoint.reference import resolve

    return [resolve(name) for name in (options.model, options.against) if name]


def _texts(options: Options, reference: "ModelReference") -> list[HeldoutText]:
    trained_on = data_config(read_tables(reference.recipe))
    named = trained_on.heldout or trained_on.dataset or trained_on.sources
    if not (options.rows.data or named):
        raise UserError(f"{reference.folder} has no recipe that names held-out text: give --data")
    return [heldout_text(reference, text) for text in options.texts]


def _rows(text: HeldoutText, references: "list[ModelReference]") -> "list[Tensor]":
    """Return sequences, int64 [1, length] each; raise UserError if the text is too short."""
    size = min(vocabulary_size(reference.config) for reference in references)
    rows = [inputs["input"] for inputs, *_ in text.sequences(size, apart=False)]
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
    """Return the name of the folder or, for a model of the hub, the last part of its name."""
    return reference.folder.name if Path(given).expanduser().exists() else Path(given).name


def _distinct(labels: list[str], full: list[str]) -> list[str]:
    """Return `labels`, or `full` if two labels are the same."""
    return labels if len(set(labels)) == len(labels) else full


STAGE = Stage(
    "analyze",
    "Measure the rank of a model's recurrent states over time.",
    Options,
    run,
    check,
)

if __name__ == "__main__":
    STAGE.main()
