"""Finding the documents that a recipe names: embedded, generated, in local files or on the hub."""

from typing import Any

from flame.data import corpus, mqar
from flame.data.config import DataConfig
from flame.data.documents import (
    Documents,
    IndexedDocuments,
    StreamedDocuments,
    check_column,
    checked_text,
    no_documents,
    reading,
)
from flame.data.hub import hub_problem
from flame.data.local_files import base_split, local_files, local_path
from flame.data.mixing import MixedDocuments, shares, source_configs
from flame.errors import UserError, first_line


def build_documents(config: DataConfig, split: str) -> Documents:
    """Return the documents of `split` of `config.dataset`, or of all `config.sources`.

    A source that names a split of its own is read from that one. A prepared set is cached by the
    `datasets` library; a lock makes processes that prepare the same set wait for each other.

    Raises:
        UserError: the set is missing, empty or unreachable, or has no column `config.text_key`.
    """
    if config.max_documents < 0:
        raise UserError(f"data.max_documents is {config.max_documents}: 0 is all of them")
    if config.sources:
        configs = source_configs(config)
        splits = [own.split if own.split != config.split else split for own in configs]
        parts = [build_documents(own, part) for own, part in zip(configs, splits, strict=True)]
        return MixedDocuments(parts, shares(config))
    if config.dataset == corpus.NAME:
        return _embedded(config, split)
    if mqar.is_mqar(config.dataset):
        return mqar.mqar_documents(config.dataset, split, config.seed)
    rows, text_key, name = _load(config, split)
    if rows.column_names is not None:
        check_column(name, text_key, rows.column_names)
        rows = rows.select_columns([text_key])
    if config.streaming:
        return StreamedDocuments(name, rows, text_key, config.max_documents)
    size = min(config.max_documents or len(rows), len(rows))

    def take(numbers: list[int]) -> list[str]:
        return [checked_text(value, name, text_key) for value in rows[numbers][text_key]]

    if size == 0:
        raise no_documents(name)
    return IndexedDocuments(name, size, take, config.shuffle, config.seed)


def _embedded(config: DataConfig, split: str) -> IndexedDocuments:
    texts = corpus.stdlib_texts(split)[: config.max_documents or None]

    def take(numbers: list[int]) -> list[str]:
        return [texts[number] for number in numbers]

    return IndexedDocuments(corpus.NAME, len(texts), take, config.shuffle, config.seed)


def _load(config: DataConfig, split: str) -> tuple[Any, str, str]:
    """Return a data set, the name of its text column, and its name in error messages."""
    if not config.dataset:
        raise UserError(
            "no data: give data.dataset (a hub name, a local file or folder, or python-stdlib)"
        )
    path, name = local_path(config.dataset), f"{config.dataset} ({split})"
    if path is None:
        return _load_hub(config, split, name), config.text_key, name
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


def _load_hub(config: DataConfig, split: str, name: str) -> Any:
    problem = hub_problem()
    # Offline on purpose, the library answers from its cache at once; otherwise it retries for long.
    if problem is not None and "HF_HUB_OFFLINE" not in problem:
        raise _unreachable(config.dataset, problem)
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
