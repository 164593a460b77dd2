"""Stage `tokenizer`: train a byte-level BPE tokenizer on text."""

from dataclasses import dataclass
from pathlib import Path

from flame.data.files.local_files import local_path
from flame.data.tokenizer import SMALLEST_VOCABULARY, train_tokenizer
from flame.errors import UserError
from flame.options import argument, option
from flame.process.atomic_output import replacing_folder
from flame.process.output_checks import check_output
from flame.stage import Stage


@dataclass(frozen=True)
class Options:
    out: Path = argument("OUT", "folder to write")
    size: int = option(32000, "tokens of the vocabulary", least=SMALLEST_VOCABULARY, metavar="N")
    data: str = option(
        "python-stdlib", "text: hub name, file or folder, or the interpreter's own source"
    )
    subset: str = option("", "configuration of a hub data set")
    split: str = option("train", "split of the data set")
    text_key: str = option("text", "column that holds the text")
    max_documents: int = option(0, "read only so many documents; 0 reads all", least=0, metavar="N")
    overwrite: bool = option(False, "replace an existing output that slimstate made")


def check(options: Options, world_size: int = 1) -> None:
    """Raise UserError for more than one process, no text or an output that is there."""
    if world_size != 1:
        raise UserError(f"--nproc {world_size}: tokenizer merges counts, run it on 1 process")
    check_output(options.out, options.overwrite)
    local_path(options.data)


def run(options: Options) -> None:
    """Read the text, train and write the tokenizer; raise UserError if the text is missing."""
    from flame.data.config import DataConfig
    from flame.data.sources import build_documents

    config = DataConfig(
        dataset=options.data,
        subset=options.subset,
        text_key=options.text_key,
        max_documents=options.max_documents,
        shuffle=False,
    )
    texts = build_documents(config, options.split).shard(0, 1, epoch=0, start=0)
    with replacing_folder(options.out.absolute(), options.overwrite) as folder:
        tokenizer = train_tokenizer(texts, options.size, folder)
    print(f"{options.out}: {len(tokenizer):,} tokens", flush=True)


STAGE = Stage("tokenizer", "Train a byte-level BPE tokenizer on text.", Options, run, check)

if __name__ == "__main__":
    STAGE.main()
