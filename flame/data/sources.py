"""Documents from the embedded corpus, local files or the hub, dealt out to virtual shards.

Document i of an epoch's order belongs to virtual shard i mod V. The order of a set that can be
indexed is a permutation drawn anew for each epoch. A stream keeps its own order; where its files
can be dealt out evenly, each shard reads its own files only.
"""

import logging
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from flame.data import corpus, mqar
from flame.data.config import DataConfig
from flame.data.hub import hub_problem
from flame.data.local_files import base_split, local_files, looks_local
from flame.data.mixing import MixedDocuments, shares, source_configs
from flame.errors import UserError, first_line

READ_CHUNK = 64
"""Documents fetched at once."""


class Documents(Protocol):
    @property
    def name(self) -> str:
        """The set as errors call it."""

    @property
    def size(self) -> int | None:
        """Number of documents, `None` for a stream."""

    def shard(self, shard: int, num_shards: int, epoch: int, start: int) -> Iterator[str]:
        """The texts of a virtual shard in the order of an epoch, from its `start`-th on."""


class Texts(Protocol):
    """What can be indexed: a column of a data set, or the embedded corpus."""

    def __len__(self) -> int: ...

    def take(self, indices: Sequence[int]) -> list[str]: ...


@dataclass
class IndexedDocuments:
    """A set of known size, permuted anew for each epoch if `shuffle`."""

    name: str
    texts: Texts
    shuffle: bool
    seed: int

    @property
    def size(self) -> int:
        return len(self.texts)

    def shard(self, shard: int, num_shards: int, epoch: int, start: int) -> Iterator[str]:
        order = self.order(epoch)[shard::num_shards][start:].copy()
        for first in range(0, len(order), READ_CHUNK):
            yield from self.texts.take(order[first : first + READ_CHUNK].tolist())

    def order(self, epoch: int) -> NDArray[np.int64]:
        """The permutation `[size]` of an epoch, a function of size, seed and epoch alone."""
        if not self.shuffle:
            return np.arange(self.size)
        # RandomState: its stream is the same in every version of numpy, and a run may resume later.
        bits = np.random.MT19937(np.random.SeedSequence([self.seed, epoch]))
        return np.random.RandomState(bits).permutation(self.size)


@dataclass
class StreamedDocuments:
    """A set that is read from front to back; `limit` documents of it, 0 for all."""

    name: str
    rows: Any
    text_key: str
    limit: int = 0
    size: None = None

    def __post_init__(self) -> None:
        # The library keeps a stream's position in the set itself: two iterators over one set, as
        # two shards or two loaders have them, skip each other's documents. So each gets its own.
        self._pristine = pickle.dumps(self.rows)

    def shard(self, shard: int, num_shards: int, epoch: int, start: int) -> Iterator[str]:
        rows = self._rows(shard, num_shards, start)
        while chunk := self._read(rows):
            yield from chunk

    def _read(self, rows: Iterator[dict[str, Any]]) -> list[str]:
        with reading(self.name):
            return [self._text(row) for row in islice(rows, READ_CHUNK)]

    def _text(self, row: dict[str, Any]) -> str:
        if self.text_key not in row:
            raise _no_column(self.name, self.text_key, row)
        return checked_text(row[self.text_key], self.name, self.text_key)

    def _rows(self, shard: int, num_shards: int, start: int) -> Iterator[dict[str, Any]]:
        rows = pickle.loads(self._pristine)
        if self.limit == 0 and rows.num_shards % num_shards == 0:
            return iter(rows.shard(num_shards, shard).skip(start))
        first = shard + start * num_shards
        stop = max(self.limit - first, 0) if self.limit else None
        return islice(rows.skip(first), 0, stop, num_shards)


@dataclass
class ListedTexts:
    """Texts in memory."""

    texts: list[str]

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: Sequence[int]) -> list[str]:
        return [self.texts[index] for index in indices]


@dataclass
class Column:
    """The text column of a prepared Hugging Face data set."""

    name: str
    rows: Any
    text_key: str

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, indices: Sequence[int]) -> list[str]:
        values = self.rows[list(indices)][self.text_key]
        return [checked_text(value, self.name, self.text_key) for value in values]


def build_documents(config: DataConfig, split: str) -> Documents:
    """The documents of `split` of `config.dataset`, or of all `config.sources`.

    A source that names a split of its own is read from that one.

    Raises `UserError` for a set that is missing, empty, unreachable or has no column
    `config.text_key`. A prepared set is cached by the `datasets` library; a lock makes processes
    that prepare the same one wait for each other.
    """
    if config.max_documents < 0:
        raise UserError(f"data.max_documents is {config.max_documents}: 0 is all of them")
    if config.sources:
        configs = source_configs(config)
        splits = [own.split if own.split != config.split else split for own in configs]
        parts = [build_documents(own, part) for own, part in zip(configs, splits, strict=True)]
        return MixedDocuments(parts, shares(config))
    if config.dataset == corpus.NAME:
        texts = corpus.stdlib_texts(split)
        return _indexed(config, corpus.NAME, ListedTexts(texts[: config.max_documents or None]))
    if mqar.is_mqar(config.dataset):
        return mqar.mqar_documents(config.dataset, split, config.seed)
    rows, text_key, name = _load(config, split)
    columns = rows.column_names
    if columns is not None:
        if text_key not in columns:
            raise _no_column(name, text_key, columns)
        rows = rows.select_columns([text_key])
    if config.streaming:
        return StreamedDocuments(name, rows, text_key, config.max_documents)
    if config.max_documents:
        rows = rows.select(range(min(config.max_documents, len(rows))))
    return _indexed(config, name, Column(name, rows, text_key))


def _indexed(config: DataConfig, name: str, texts: Texts) -> IndexedDocuments:
    if len(texts) == 0:
        raise _no_documents(name)
    return IndexedDocuments(name, texts, config.shuffle, config.seed)


def _load(config: DataConfig, split: str) -> tuple[Any, str, str]:
    """A data set, its text column and its name in errors."""
    if not config.dataset:
        raise UserError(
            "no data: give data.dataset (a hub name, a local file or folder, or python-stdlib)"
        )
    path = Path(config.dataset).expanduser()
    if path.exists():
        return _load_local(config, path, split)
    if looks_local(config.dataset):
        raise UserError(
            f"data {config.dataset} does not exist: give a file, a folder or a hub name"
        )
    return _load_hub(config, split), config.text_key, f"{config.dataset} ({split})"


def _load_local(config: DataConfig, path: Path, split: str) -> tuple[Any, str, str]:
    name = f"{config.dataset} ({split})"
    loader, files = local_files(path, split)
    options: dict[str, Any] = {"sample_by": "document"} if loader == "text" else {}
    with reading(name) as datasets:
        rows = datasets.load_dataset(
            loader,
            data_files={base_split(split): [str(file) for file in files]},
            split=split,
            streaming=config.streaming,
            **options,
        )
    return rows, "text" if loader == "text" else config.text_key, name


def _load_hub(config: DataConfig, split: str) -> Any:
    problem = hub_problem()
    # Offline on purpose, the library answers from its cache at once; otherwise it retries for long.
    if problem is not None and "HF_HUB_OFFLINE" not in problem:
        raise _unreachable(config.dataset, problem)
    name = f"{config.dataset} ({split})"
    with reading(name) as datasets:
        try:
            return datasets.load_dataset(
                config.dataset,
                config.subset or None,
                split=split,
                revision=config.revision or None,
                streaming=config.streaming,
            )
        except ConnectionError as error:
            raise _unreachable(config.dataset, problem or first_line(error)) from error


def _unreachable(name: str, problem: str) -> UserError:
    return UserError(
        f"data set {name!r} is no local file or folder, and as a hub name it cannot be loaded: "
        f"{problem}; give data.dataset a local parquet, json, jsonl or txt file or folder, or "
        "python-stdlib (HF_HUB_OFFLINE=1 uses what is cached)"
    )


def checked_text(value: Any, name: str, text_key: str) -> str:
    """`value` as a document; a missing one is empty."""
    if value is None:
        return ""
    if not isinstance(value, str):
        kind = type(value).__name__
        raise UserError(f"column {text_key!r} of {name} holds {kind}, not text: set data.text_key")
    return value


def _no_documents(name: str) -> UserError:
    return UserError(f"{name} has no documents: give data.dataset another file, folder or split")


def _no_column(name: str, text_key: str, columns: Any) -> UserError:
    return UserError(
        f"{name} has no column {text_key!r}: set data.text_key to one of {', '.join(columns)}"
    )


@contextmanager
def reading(name: str) -> Iterator[Any]:
    """The `datasets` library, silent; what it raises for unreadable data becomes a `UserError`."""
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        with _silent(datasets):
            yield datasets
    except (DatasetsError, OSError, ValueError) as error:
        cause = error.__cause__ or error
        raise UserError(f"cannot read {name}: {first_line(cause)}") from error
    except StopIteration as error:
        # The JSON reader ends so on a file without a single record.
        raise _no_documents(name) from error


@contextmanager
def _silent(datasets: Any) -> Iterator[None]:
    bars, level = not datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()
