"""Stage `convert`: a model as a Hugging Face folder or as a run folder (DCP).

`slimstate convert SRC DST --to hf|dcp|peft [--overwrite]`, or `python -m flame.convert` likewise.
"""

import argparse
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from flame.errors import run_stage


@dataclass(frozen=True)
class Options:
    src: str
    """The model: a run folder, a step folder, a Hugging Face folder or a hub name."""
    dst: Path
    """The folder to write."""
    to: Literal["hf", "dcp", "peft"]
    """`hf`: config.json and safetensors; `dcp`: a run folder with the model as step 0; `peft`: the
    adapters of a LoRA run alone. The others merge adapters."""
    overwrite: bool = False
    """Replace an existing output."""


def parse(argv: list[str] | None = None) -> Options:
    """Options from a command line."""
    parser = argparse.ArgumentParser(prog="slimstate convert", description=__doc__.splitlines()[0])
    parser.add_argument("src", metavar="SRC", help="run, step or Hugging Face folder, or hub name")
    parser.add_argument("dst", metavar="DST", type=Path, help="folder to write")
    parser.add_argument(
        "--to", required=True, choices=("hf", "dcp", "peft"), help="format to write"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    values = parser.parse_args(argv)
    to = cast(Literal["hf", "dcp", "peft"], values.to)
    return Options(values.src, values.dst, to, values.overwrite)


def check(options: Options) -> None:
    """Refuse a source that is not there and an output that must not be written."""
    from flame.checkpoint.peft_folder import check_adapters
    from flame.checkpoint.reference import check_destination, resolve

    reference = resolve(options.src)
    if options.to == "peft":
        check_adapters(reference)
    check_destination(reference, options.dst.absolute(), options.overwrite)


def run(options: Options) -> None:
    """Convert on the first process; others have nothing to do."""
    from flame.checkpoint.convert import convert

    if int(os.environ.get("RANK", "0")) == 0:
        convert(options.src, options.dst, options.to, options.overwrite)


def main(argv: list[str] | None = None) -> None:
    """Parse, check and run; a `UserError` ends in one line and exit status 1."""

    def stage() -> None:
        options = parse(argv)
        if int(os.environ.get("RANK", "0")) == 0:
            check(options)
            run(options)

    run_stage(stage)


if __name__ == "__main__":
    main()
