"""Stage `eval`: held-out perplexity of any model reference.

`slimstate eval MODEL --perplexity [DATA] [--json FILE]`, or the same arguments after
`torchrun … -m launch.evaluate`. In a running process group, `evaluate_perplexity` does the same.
"""

import argparse
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flame.errors import UserError, run_stage
from flame.output import check_file_output, replacing_file
from launch.heldout_text import HeldoutOptions, check_text, heldout_text
from launch.perplexity import DTYPES, Perplexity, evaluate_perplexity, vocabulary
from launch.table import Column, Table

COLUMNS = (
    Column("model", "model", align="left"),
    Column("perplexity", "perplexity", ",.4f"),
    Column("bits_per_byte", "bits per byte", ".4f"),
    Column("tokens", "tokens", ",d"),
    Column("parameters", "parameters", ",d"),
    Column("state_bytes", "state bytes", ",d"),
)


@dataclass(frozen=True)
class Options:
    model: str
    text: HeldoutOptions
    json: Path | None = None
    dtype: str = "auto"
    overwrite: bool = False


def parse(argv: list[str] | None = None) -> Options:
    """Options from a command line."""
    parser = argparse.ArgumentParser(
        prog="slimstate eval",
        description="Measure a model on held-out text.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="run folder, step folder, Hugging Face folder or hub name")
    add(
        "--perplexity",
        nargs="?",
        const="",
        metavar="DATA",
        help="held-out perplexity on DATA: hub name, file or folder (default: the recipe's)",
    )
    add("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    add("--seq-len", type=int, metavar="N", help="tokens a row (default: the recipe's, or 2048)")
    add("--max-sequences", type=int, metavar="N", help="rows to read (default: all)")
    add("--tokenizer", default="", metavar="T", help="folder or hub name (default: the model's)")
    add("--subset", default="", help="configuration of a hub data set")
    add("--split", default="", help="split of DATA")
    add("--text-key", default="", help="column of DATA that holds the text (default: text)")
    add("--dtype", choices=DTYPES, default="auto", help="compute dtype; auto: bfloat16 on CUDA")
    add("--overwrite", action="store_true", help="replace FILE if it exists")
    return _options(parser.parse_args(argv))


def check(options: Options, world_size: int = 1) -> None:
    """Refuse what cannot work: the model, the text, the tokenizer, the output."""
    from flame.checkpoint.reference import resolve

    _check_numbers(options)
    reference = resolve(options.model)
    if options.json is not None:
        check_file_output(options.json, options.overwrite, inside=reference.folder)
    text = heldout_text(reference, options.text)
    _check_family(reference.config)
    if int(os.environ.get("RANK", "0")) == 0:
        check_text(text, vocabulary(reference.config), from_recipe=not options.text.data)


def run(options: Options) -> None:
    """Evaluate, print a table, write JSON. Collective; inside a process group, or starting one."""
    from flame.distributed import process_group, rank

    with process_group():
        result = evaluate_perplexity(options.model, options.text, options.dtype)
        if rank() == 0:
            _write(result, options)


def _options(values: argparse.Namespace) -> Options:
    if values.perplexity is None:
        raise UserError("say what to measure: --perplexity, or --perplexity DATA")
    text = HeldoutOptions(
        data=values.perplexity,
        subset=values.subset,
        split=values.split,
        text_key=values.text_key,
        tokenizer=values.tokenizer,
        seq_len=values.seq_len,
        max_sequences=values.max_sequences,
    )
    return Options(values.model, text, values.json, values.dtype, values.overwrite)


def _check_numbers(options: Options) -> None:
    for name in ("seq_len", "max_sequences"):
        value = getattr(options.text, name)
        if value is not None and value < 1:
            option = "--" + name.replace("_", "-")
            raise UserError(f"{option} is {value}: it must be at least 1")


def _check_family(config: dict[str, Any]) -> None:
    """Refuse an unknown family. Known ones pass without the seconds that importing fla takes."""
    from pruning.adapters import ADAPTERS

    if config["model_type"] not in ADAPTERS:
        from flame.model import stock_config

        stock_config(config)


def _write(result: Perplexity, options: Options) -> None:
    print(Table(COLUMNS, [result.record()]).text(), flush=True)
    if options.json is not None:
        with replacing_file(options.json, options.overwrite) as temporary:
            temporary.write_text(json.dumps(result.record(), indent=2) + "\n")


def main(argv: list[str] | None = None) -> None:
    def stage() -> None:
        options = parse(argv)
        check(options, int(os.environ.get("WORLD_SIZE", "1")))
        run(options)

    run_stage(stage)


if __name__ == "__main__":
    main()
