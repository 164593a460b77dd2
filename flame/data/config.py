"""The `[data]` section of a recipe."""

from dataclasses import dataclass, field


@dataclass
class DataConfig:
    dataset: str = ""
    """Training text: a hub name, a local file or folder (parquet, json, jsonl, txt), or
    `python-stdlib`, the running interpreter's own standard-library source, or `mqar:…`, generated
    associative recall (`flame.data.mqar.Mqar` has its numbers)."""

    sources: list[str] = field(default_factory=list)
    """Several sources in the place of `dataset`, each in its forms, with options of its own as
    `NAME?subset=…&text_key=…`: subset, split, revision, text_key, streaming, max_documents."""

    weights: list[float] = field(default_factory=list)
    """Share of each source in the tokens that are trained on; empty for equal shares. A source that
    ends begins again (`repeat`), or ends the data."""

    subset: str = ""
    """Configuration of a hub data set, where it has several."""

    split: str = "train"
    """Split to train on; `train[:90%]` takes a part (not when streaming)."""

    revision: str = ""
    """Revision of a hub data set; empty for its latest."""

    text_key: str = "text"
    """Column that holds the text. A txt file is one document and needs none."""

    streaming: bool = False
    """Read documents as they are needed instead of preparing the whole set first."""

    max_documents: int = 0
    """Use only the first documents of a split; 0 uses all."""

    heldout: str = ""
    """Held-out text, in the forms of `dataset`; empty for another split of `dataset`."""

    heldout_split: str = ""
    """Split of the held-out text; empty for `heldout` (python-stdlib), `train` (a local `heldout`)
    or `validation`."""

    tokenizer: str = ""
    """Tokenizer: a folder or a hub name."""

    add_eos: bool = True
    """Close each document with the tokenizer's end-of-text token."""

    varlen: bool = True
    """Keep packed documents apart: `cu_seqlens` for the model, no label across a boundary."""

    shuffle: bool = True
    """Permute the documents anew each epoch; a stream keeps its order."""

    seed: int = 0
    """Seed of the permutations."""

    repeat: bool = True
    """Begin again when the documents end; otherwise the data end with the first virtual shard that
    runs out."""

    virtual_shards: int = 8
    """Parts that documents are packed in, the same for the whole run; every world size must divide
    it."""
