"""Finding the documents that a recipe names: embedded, generated, in local files or on the hub."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

from flame.data import corpus, mqar
from flame.data.config import DataConfig
from flame.data.documents import (
    Documents,
    IndexedDocuments,
    StreamedDocuments,
    check_column,
    no_documents,
    reading,
)
from flame.data.files.bad_rows import BadRows
from flame.data.files.blocks import Block
from flame.data.files.dealt import DealtDocuments
from flame.data.files.lines import line_blocks
from flame.data.files.local_files import FORMATS, base_split, check_split, local_files, local_path
from flame.data.files.parquet import row_groups
from flame.data.files.prepared import prepared_rows
from flame.data.files.saved_folder import is_saved_folder, saved_rows
from flame.data.files.whole import json_files, text_files
from flame.data.hub import hub_problem
from flame.data.mixing import MixedDocuments, shares, source_configs
from flame.errors import UserError, first_line

log = logging.getLogger(__name__)


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
    name = f"{config.dataset} ({split})"
    bad_rows = BadRows(name, config.text_key, config.max_bad_rows)
    path = _path(config)
    if path is None:
        return _of_hub(config, split, bad_rows)
    if is_saved_folder(path):
        return _indexed(_part(saved_rows(path, split), split), config, bad_rows)
    check_split(path, split)
    form, files = local_files(path)
    blocks = file_blocks(form, [str(file) for file in files], config)
    if not blocks:
        raise no_documents(name)
    if config.streaming:
        return _dealt(blocks, config, split, bad_rows)
    rows = prepared_rows(blocks, config.text_key, bad_rows)
    return _indexed(_part(rows, split), config, dataclasses.replace(bad_rows, text_key="text"))


def file_blocks(form: str, files: list[str], config: DataConfig) -> list[Block]:
    """Return the blocks of files of one format, in order.

    There are at least eight for each virtual shard, where the format and the size allow it.

    Raises:
        UserError: a file cannot be read, or has no text column.
    """
    parts = 8 * max(config.virtual_shards, 1)
    if form == "parquet":
        return [*row_groups(files, config.text_key)]
    if form == "text":
        return [*text_files(files, parts)]
    whole = [file for file in files if file.lower().endswith(".json")]
    lines = [file for file in files if file not in set(whole)]
    blocks: list[Block] = [*json_files(whole), *line_blocks(lines, parts)]
    place = {file: number for number, file in enumerate(files)}
    return sorted(blocks, key=lambda block: (place[block.place[0]], block.place[1]))


def _path(config: DataConfig) -> Path | None:
    if not config.dataset:
        raise UserError(
            "no data: give data.dataset (a hub name, a local file or folder, or python-stdlib)"
        )
    return local_path(config.dataset)


def _dealt(
    blocks: list[Block], config: DataConfig, split: str, bad_rows: BadRows
) -> DealtDocuments:
    if split != base_split(split):
        raise UserError(
            f"cannot read {bad_rows.name}: a stream has no slices, give {split!r} whole"
        )
    return DealtDocuments(bad_rows.name, blocks, config.text_key, bad_rows, config.max_documents)


def _indexed(rows: Any, config: DataConfig, bad_rows: BadRows) -> IndexedDocuments:
    check_column(bad_rows.name, bad_rows.text_key, rows.column_names)
    rows = rows.select_columns([bad_rows.text_key])
    size = min(config.max_documents or len(rows), len(rows))

    def take(numbers: list[int]) -> list[str]:
        cells = rows[numbers][bad_rows.text_key]
        return [bad_rows.text(cell, n) for n, cell in zip(numbers, cells, strict=True)]

    if size == 0:
        raise no_documents(bad_rows.name)
    return IndexedDocuments(bad_rows.name, size, take, config.shuffle, config.seed)


def _part(rows: Any, split: str) -> Any:
    """Return the part of a whole set that `split` names, such as `train[:90%]`."""
    if split == base_split(split):
        return rows
    with reading(split) as datasets:
        instruction = datasets.ReadInstruction.from_spec(split)
        parts = instruction.to_absolute({base_split(split): len(rows)})
    return rows.select([n for part in parts for n in range(part.from_, part.to)])


def _embedded(config: DataConfig, split: str) -> IndexedDocuments:
    texts = corpus.stdlib_texts(split)[: config.max_documents or None]

    def take(numbers: list[int]) -> list[str]:
        return [texts[number] for number in numbers]

    return IndexedDocuments(corpus.NAME, len(texts), take, config.shuffle, config.seed)


def _of_hub(config: DataConfig, split: str, bad_rows: BadRows) -> Documents:
    problem = hub_problem()
    # Offline on purpose, the library answers from its cache at once; otherwise it retries for long.
    if problem is not None and "HF_HUB_OFFLINE" not in problem:
        raise _unreachable(config.dataset, problem)
    with reading(bad_rows.name) as datasets:
        try:
            options = {"name": config.subset or None, "revision": config.revision or None}
            if not config.streaming:
                rows = datasets.load_dataset(config.dataset, split=split, **options)
                return _indexed(rows, config, bad_rows)
            builder = datasets.load_dataset_builder(config.dataset, **options)
            found = files_of_builder(builder, split)
            if found is not None:
                return _dealt(file_blocks(*found, config), config, split, bad_rows)
            rows = builder.as_streaming_dataset(split=split)
        except ConnectionError as error:
            raise _unreachable(config.dataset, problem or first_line(error)) from error
    log.info(
        "%s is no set of parquet or JSON lines: each virtual shard reads all of it", bad_rows.name
    )
    if rows.column_names is not None:
        check_column(bad_rows.name, config.text_key, rows.column_names)
        rows = rows.select_columns([config.text_key])
    return StreamedDocuments(bad_rows.name, rows, config.text_key, bad_rows, config.max_documents)


def files_of_builder(builder: Any, split: str) -> tuple[str, list[str]] | None:
    """Return format and files of a split of a `datasets` builder; None where it is no plain files.

    Raises:
        UserError: the set has no such split.
    """
    form = type(builder).__module__.rpartition(".")[2]
    data_files = builder.config.data_files
    if form not in ("parquet", "json") or not data_files:
        return None
    if base_split(split) not in data_files:
        raise UserError(
            f"the set has no split {split!r}: choose from {', '.join(map(str, data_files))}"
        )
    files = [str(file) for file in data_files[base_split(split)]]
    suffixes = FORMATS[form]
    return (form, files) if all(file.lower().endswith(suffixes) for file in files) else None


def _unreachable(name: str, problem: str) -> UserError:
    return UserError(
        f"data set {name!r} is no local file or folder, and as a hub name it cannot be loaded: "
        f"{problem}; give a local parquet, json, jsonl or txt file or folder, or "
        "python-stdlib (HF_HUB_OFFLINE=1 uses what is cached)"
    )
