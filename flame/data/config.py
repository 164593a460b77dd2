"""The `[data]` section of a recipe."""

from dataclasses import dataclass

from flame.options import option


@dataclass
class DataConfig:
    dataset: str = option(
        "",
        "training text: a hub name, a local file or folder (parquet, json, jsonl, jsonl.gz, txt, "
        "or what `save_to_disk` of datasets wrote), or "
        "`python-stdlib`, the running interpreter's own standard-library source, or `mqar:…`, "
        "generated associative recall (`flame.data.mqar.Mqar` has its numbers)",
    )
    sources: list[str] = option(
        [],
        "several sources in the place of `dataset`, each in its forms, with options of its own as "
        "`NAME?subset=…&text_key=…`: subset, split, revision, text_key, streaming, max_documents",
    )
    weights: list[float] = option(
        [],
        "share of each source in the tokens that are trained on; empty for equal shares. A source "
        "that ends begins again (`repeat`), or ends the data",
    )
    subset: str = option("", "configuration of a hub data set, where it has several")
    split: str = option(
        "train",
        "split to train on; `train[:90%]` takes a part (not when streaming). Local files have only "
        "`train`, which is all of them, whatever their names",
    )
    revision: str = option("", "revision of a hub data set; empty for its latest")
    text_key: str = option(
        "text", "column that holds the text; a txt file is one document and needs none"
    )
    streaming: bool = option(
        False,
        "read documents as they are needed instead of preparing the whole set first. Parquet is "
        "dealt to the virtual shards by row groups, JSON lines by blocks of bytes; compressed and "
        "other files are read whole",
    )
    max_documents: int = option(
        0, "use only the first documents of a split; 0 uses all", least=0, most=2**62
    )
    max_bad_rows: int = option(
        100,
        "rows that are no text (another type, half a character, a damaged part of a file) which "
        "are skipped, in each process; with one more the job stops, after training saved its step",
        least=0,
        most=2**62,
    )
    heldout: str = option(
        "", "held-out text, in the forms of `dataset`; empty for another split of `dataset`"
    )
    heldout_split: str = option(
        "",
        "split of the held-out text; empty for `heldout` (python-stdlib), `train` (a local "
        "`heldout`) or `validation`",
    )
    tokenizer: str = option("", "tokenizer: a folder or a hub name")
    add_eos: bool = option(
        True,
        "close each document with the tokenizer's end-of-text token. A special token that a text "
        "spells is plain text",
    )
    varlen: bool = option(
        True,
        "keep packed documents apart: `cu_seqlens` for the model, no label across a boundary",
    )
    shuffle: bool = option(True, "permute the documents anew each epoch; a stream keeps its order")
    seed: int = option(0, "seed of the permutations", least=0, most=2**62)
    repeat: bool = option(
        True,
        "begin again when the documents end; otherwise the data end with the first virtual shard "
        "that runs out",
    )
    virtual_shards: int = option(
        8,
        "parts that documents are packed in, the same for the whole run; every world size must "
        "divide it",
        least=1,
        most=2**16,
    )
