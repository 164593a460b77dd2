"""Which files of a folder are read; names and paths of every kind."""

import gzip
import json
import logging
from pathlib import Path

import pytest

from flame.data.config import DataConfig
from flame.data.files.local_files import local_files
from flame.data.sources import build_documents
from flame.errors import UserError
from tests.flame.text import random_texts, write_jsonl

TEXTS = random_texts(12, seed=3)


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def texts_of(path: Path | str, streaming: bool = False, **values: object) -> list[str]:
    config = DataConfig(dataset=str(path), shuffle=False, streaming=streaming, **values)  # type: ignore[arg-type]
    return list(build_documents(config, "train").shard(0, 1, 0, 0))


def compressed(path: Path, texts: list[str]) -> Path:
    path.write_bytes(
        gzip.compress(b"".join(json.dumps({"text": t}).encode() + b"\n" for t in texts))
    )
    return path


@pytest.mark.parametrize("streaming", [False, True])
def test_plain_and_compressed_lines_are_read_together(tmp_path: Path, streaming: bool) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", TEXTS[:4])
    compressed(folder / "b.jsonl.gz", TEXTS[4:9])
    (folder / "c.json").write_text(json.dumps([{"text": text} for text in TEXTS[9:]]))
    assert texts_of(folder, streaming) == TEXTS


def test_what_is_taken_and_left_out_is_listed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("train-0.jsonl", "test-0.jsonl"):
        write_jsonl(tmp_path / name, TEXTS)
    (tmp_path / "README.md").write_text("about it")
    (tmp_path / "more.csv").write_text("text")
    with caplog.at_level(logging.INFO):
        form, files = local_files(tmp_path)
    assert (form, [file.name for file in files]) == ("json", ["test-0.jsonl", "train-0.jsonl"])
    said = caplog.text
    assert all(n in said for n in ("2 files", "test-0.jsonl", "left out", "README.md", "more.csv"))


def test_a_folder_of_several_formats_is_refused(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text("text")
    write_jsonl(tmp_path / "meta.json", ["about"])
    with pytest.raises(
        UserError, match=r"1 of json and 3 of text|3 of text and 1 of json"
    ) as error:
        local_files(tmp_path)
    assert "meta.json" in str(error.value) and "0.txt" in str(error.value)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "name", ["a [x] (y)", "a::b", "~a", "a b", "hf:", "a?b", "a*", "train[:50%]", "ä{c}"]
)
def test_paths_are_literal(
    tmp_path: Path, name: str, streaming: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / name
    folder.mkdir()
    write_jsonl(folder / f"{name}.jsonl", TEXTS)
    assert texts_of(folder, streaming) == TEXTS
    assert texts_of(folder / f"{name}.jsonl", streaming) == TEXTS
    monkeypatch.chdir(tmp_path)
    assert texts_of(name, streaming) == TEXTS


def test_an_unknown_home_is_one_line() -> None:
    with pytest.raises(UserError, match="does not exist"):
        build_documents(DataConfig(dataset="~no-such-user/data.jsonl"), "train")


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    assert texts_of(path) == TEXTS
    write_jsonl(path, TEXTS[::-1])
    assert texts_of(path) == TEXTS[::-1]
