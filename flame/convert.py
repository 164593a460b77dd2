"""Stage `convert`: write a model as a Hugging Face folder or as a run folder (DCP)."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from flame.checkpoint.foreign import GIVEN, GivenFiles
from flame.errors import UserError
from flame.options import REQUIRED, argument, group, option
from flame.stage import Stage

if TYPE_CHECKING:
    from flame.hugging_face.outer_model import OuterModel


@dataclass(frozen=True)
class Options:
    src: str = argument("SRC", "run, step or Hugging Face folder, or hub name")
    dst: Path = argument("DST", "folder to write")
    to: Literal["hf", "dcp", "peft"] = option(
        REQUIRED,
        "format to write: a Hugging Face folder; a run folder with the model as step 0; or the "
        "adapters of a LoRA run alone, which the other two merge",
    )
    base: str | None = option(
        None,
        "with --to peft: the base model as the adapters shall name it, a Hugging Face folder or a "
        "hub name (default: the one that they were trained on)",
        metavar="MODEL",
    )
    within: str | None = option(
        None,
        "with --to hf: put the text model back into this model of text and more, a Hugging Face "
        "folder or a hub name (default: the one it is read from, if it is)",
        metavar="MODEL",
    )
    overwrite: bool = option(False, "replace an existing output that slimstate made")
    given: GivenFiles = group(GivenFiles, GIVEN)


def check(options: Options, world_size: int = 1) -> None:
    """Raise UserError if the source is missing, or the output must not be written."""
    from flame.checkpoint.reference import check_destination

    reference = options.given.resolve(options.src)
    if options.to == "peft":
        from flame.lora.peft_folder import check_adapters

        check_adapters(reference, options.base)
    elif options.base is not None:
        raise UserError(f"--base is for --to peft: --to {options.to} merges the adapters")
    _outer(options)
    check_destination(reference, options.dst.absolute(), options.overwrite)


def run(options: Options) -> None:
    """Convert on rank 0 and say what was written; other ranks do nothing."""
    from flame.checkpoint.convert import convert

    if int(os.environ.get("RANK", "0")) == 0:
        source = options.given.resolve(options.src)
        done = convert(
            source,
            options.dst,
            options.to,
            options.overwrite,
            base=options.base,
            within=_outer(options),
        )
        print(f"{options.dst}: {done}", flush=True)


def _outer(options: Options) -> "OuterModel | None":
    """Return the model that `--within` names; raise UserError if it holds no text model."""
    if options.within is None:
        return None
    from flame.checkpoint.reference import resolve
    from flame.hugging_face.put_back import outer_of

    if options.to != "hf":
        raise UserError(f"--within is for --to hf: --to {options.to} takes the text model alone")
    outer = outer_of(resolve(options.within))
    if outer is None:
        raise UserError(
            f"--within {options.within}: this is a text model alone, without a vision tower or an "
            "MTP head around it"
        )
    return outer


STAGE = Stage(
    "convert",
    "Write a model as a Hugging Face folder or as a run folder (DCP).",
    Options,
    run,
    check,
)

if __name__ == "__main__":
    STAGE.main()
