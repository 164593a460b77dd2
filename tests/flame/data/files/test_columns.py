"""Columns that differ from file to file, saved folders, and rows that are no text."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flame.data.config import DataConfig
from flame.data.sources import build_documents
from flame.errors import UserError
from tests.flame.text import random_texts

TEXTS = random_texts(12, seed=4)


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def texts_of(path: Path, streaming: bool, split: str = "train", **values: Any) -> list[str]:
    config = DataConfig(dataset=str(path), shuffle=False, streaming=streaming, **values)
    return list(build_documents(config, split).shard(0, 1, 0, 0))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_other_columns_than_the_first_files(tmp_path: Path, form: str, streaming: bool) -> None:
    """Beside the text each file has what it likes; in the first, the text itself is null."""
    folder = tmp_path / "data"
    folder.mkdir()
    tables: list[dict[str, list[Any]]] = [
        {"text": [None] * 3, "id": [1, 2, 3]},
        {"id": ["x"] * 5, "text": TEXTS[:5], "meta": [{"url": "u"}] * 5},
        {"text": TEXTS[5:], "score": [0.5] * 7},
    ]
    for number, table in enumerate(tables):
        if form == "parquet":
            pq.write_table(pa.table(table), folder / f"{number}.parquet")
        else:
            rows = [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{number}.jsonl").write_text(lines)
    assert texts_of(folder, streaming) == [""] * 3 + TEXTS


@pytest.mark.parametrize(
    "kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
def test_every_type_of_text(tmp_path: Path, kind: pa.DataType) -> None:
    pq.write_table(pa.table({"text": pa.array(TEXTS).cast(kind)}), tmp_path / "a.parquet")
    assert texts_of(tmp_path / "a.parquet", streaming=True) == TEXTS


def test_a_file_without_the_column_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    pq.write_table(pa.table({"text": TEXTS}), folder / "a.parquet")
    pq.write_table(pa.table({"body": TEXTS}), folder / "b.parquet")
    with pytest.raises(UserError, match=r"b.parquet has no column 'text': .* body"):
        build_documents(DataConfig(dataset=str(folder)), "train")


BAD_LINES = [
    b'{"text": 5}',
    b'{"text": "half \\ud83d of it"}',
    b'{"text": ["a"]}',
    b'{"body": "x"}',
    b"{",
    b'{"text": "\xff"}',
    b"[" * 100_000,
]


@pytest.mark.parametrize("streaming", [False, True])
def test_bad_rows_are_skipped_up_to_the_limit(tmp_path: Path, streaming: bool) -> None:
    good = [json.dumps({"text": text}).encode() for text in TEXTS]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([*good[:4], *BAD_LINES, *good[4:]]))
    expected = [*TEXTS[:4], *[""] * len(BAD_LINES), *TEXTS[4:]]
    assert texts_of(path, streaming, max_bad_rows=len(BAD_LINES)) == expected
    with pytest.raises(UserError, match="more than 6 rows are no text; the first: .*holds int"):
        texts_of(path, streaming, max_bad_rows=len(BAD_LINES) - 1)


def test_a_bad_row_counts_once_however_often_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([b'{"text": "a"}', *BAD_LINES]))
    config = DataConfig(dataset=str(path), streaming=True, max_bad_rows=len(BAD_LINES))
    documents = build_documents(config, "train")
    for epoch in range(3):
        assert list(documents.shard(0, 1, epoch, 0)) == ["a", *[""] * len(BAD_LINES)]


def test_a_damaged_row_group_and_a_cut_archive_count_as_bad_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": TEXTS}), path, row_group_size=4, compression="none")
    content = bytearray(path.read_bytes())
    begin = pq.read_metadata(path).row_group(1).column(0).dictionary_page_offset
    content[begin : begin + 8] = b"\xff" * 8
    path.write_bytes(content)
    assert texts_of(path, streaming=True) == [*TEXTS[:4], *[""] * 4, *TEXTS[8:]]
    with pytest.raises(UserError, match="row group 1 of .*a.parquet is damaged"):
        texts_of(path, streaming=True, max_bad_rows=3)
    lines = b"".join(json.dumps({"text": t}).encode() + b"\n" for t in TEXTS * 200)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines)[:-3000])
    found = texts_of(tmp_path / "b.jsonl.gz", streaming=True)
    assert found[:-1] == (TEXTS * 200)[: len(found) - 1] and found[-1] == ""


@pytest.mark.parametrize("streaming", [False, True])
def test_folders_that_datasets_saved(tmp_path: Path, streaming: bool) -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"text": TEXTS, "id": list(range(12))})
    rows.save_to_disk(tmp_path / "one", num_shards=3)
    (tmp_path / "one").rename(tmp_path / "one::[a]")
    splits = {"train": rows.select(range(9)), "validation": rows.select(range(9, 12))}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "both")
    assert texts_of(tmp_path / "one::[a]", streaming) == TEXTS
    assert texts_of(tmp_path / "one::[a]", streaming, "train[50%:]") == TEXTS[6:]
    assert texts_of(tmp_path / "both", streaming) == TEXTS[:9]
    assert texts_of(tmp_path / "both", streaming, "validation") == TEXTS[9:]
    with pytest.raises(UserError, match="no split 'test': choose from train, validation"):
        texts_of(tmp_path / "both", streaming, "test")
    for path in (tmp_path / "both" / "train").glob("*.arrow"):
        path.write_bytes(b"damaged")
    with pytest.raises(UserError, match="cannot read .*both/train"):
        texts_of(tmp_path / "both", streaming)
