"""Documents from the standard library, local files, streams; errors of one line."""

import os
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flame.data import corpus
from flame.data.config import DataConfig
from flame.data.hub import reachable
from flame.data.loader import PackedLoader
from flame.data.loader_checks import check_enough, check_order
from flame.data.sources import build_documents
from flame.data.tokenizer import load_tokenizer
from flame.errors import UserError
from tests.flame.text import random_texts, tiny_tokenizer, write_jsonl

TEXTS = random_texts(40, seed=5)
FORMATS = ["parquet file", "parquet folder", "json", "jsonl", "jsonl folder", "txt folder"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub address where nobody answers."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{unused_port()}")
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def unused_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def write(form: str, folder: Path) -> Path:
    """`TEXTS` in one of `FORMATS`, beside files that are not training data."""
    import datasets

    rows = datasets.Dataset.from_dict({"text": TEXTS, "number": list(range(len(TEXTS)))})
    folder.mkdir()
    if form == "json":
        rows.to_json(folder / "a.json", lines=False)
        return folder / "a.json"
    if form.startswith("jsonl"):
        write_jsonl(folder / "0.jsonl", TEXTS[:15])
        write_jsonl(folder / "1.jsonl", TEXTS[15:])
        return write_jsonl(folder / "all.jsonl", TEXTS) if form == "jsonl" else folder
    if form == "txt folder":
        for number, text in enumerate(TEXTS):
            (folder / f"{number:03}.txt").write_text(text)
        (folder / ".hidden.txt").write_text("hidden")
        return folder
    rows.select(range(15)).to_parquet(folder / "test-0.parquet")
    rows.select(range(15, 40)).to_parquet(folder / "train-1.parquet")
    (folder / "README.md").write_text("not data")
    rows.to_parquet(folder.parent / "all.parquet")
    return folder if form == "parquet folder" else folder.parent / "all.parquet"


def texts_of(config: DataConfig, split: str = "train") -> list[str]:
    return list(build_documents(config, split).shard(0, 1, 0, 0))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", FORMATS)
def test_local_files_are_read_whole_and_in_order(
    tmp_path: Path, form: str, streaming: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write(form, tmp_path / "data")
    capfd.readouterr()
    config = DataConfig(dataset=str(path), streaming=streaming, shuffle=False)
    documents = build_documents(config, "train")
    assert list(documents.shard(0, 1, 0, 0)) == TEXTS
    shards = [list(documents.shard(shard, 3, 0, 0)) for shard in range(3)]
    assert sorted(text for texts in shards for text in texts) == sorted(TEXTS)
    assert min(map(len, shards)) > 5
    assert list(documents.shard(1, 3, 0, 3)) == shards[1][3:]
    if not streaming:
        assert shards == [TEXTS[shard::3] for shard in range(3)]
    assert documents.size == (None if streaming else len(TEXTS))
    assert capfd.readouterr() == ("", "")


def test_words_in_names_say_nothing(tmp_path: Path) -> None:
    """All files of a folder are read; no other split is made up."""
    path = write("parquet folder", tmp_path / "data")
    config = DataConfig(dataset=str(path), shuffle=False)
    assert texts_of(config) == TEXTS
    for split in ("test", "validation", "test[:50%]"):
        with pytest.raises(UserError, match="has no split .*data.heldout"):
            build_documents(config, split)
    named = write_jsonl(tmp_path / "test.jsonl", TEXTS)
    assert texts_of(DataConfig(dataset=str(named), shuffle=False)) == TEXTS


def test_a_slice_of_a_split(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "corpus.jsonl", TEXTS)
    config = DataConfig(dataset=str(path), shuffle=False)
    assert texts_of(config, "train[:75%]") + texts_of(config, "train[75%:]") == TEXTS
    with pytest.raises(UserError, match="cannot read"):
        texts_of(config, "train[:x%]")
    with pytest.raises(UserError, match="a stream has no slices"):
        texts_of(DataConfig(dataset=str(path), streaming=True), "train[:75%]")


@pytest.mark.parametrize("streaming", [False, True])
def test_only_the_first_documents(tmp_path: Path, streaming: bool) -> None:
    path = write_jsonl(tmp_path / "corpus.jsonl", TEXTS)
    config = DataConfig(dataset=str(path), streaming=streaming, shuffle=False, max_documents=7)
    documents = build_documents(config, "train")
    assert list(documents.shard(0, 1, 0, 0)) == TEXTS[:7]
    shards = [list(documents.shard(shard, 3, 0, 0)) for shard in range(3)]
    assert sorted(text for texts in shards for text in texts) == sorted(TEXTS[:7])
    with pytest.raises(UserError, match="max_documents is -1"):
        build_documents(DataConfig(dataset=str(path), max_documents=-1), "train")


def test_the_standard_library_is_deterministic_and_its_splits_are_disjoint() -> None:
    splits = {split: corpus.stdlib_texts(split) for split in corpus.SPLITS}
    assert corpus.stdlib_texts("train") == splits["train"]
    sizes = {split: sum(len(text.encode()) for text in texts) for split, texts in splits.items()}
    assert sizes["train"] > 5_000_000
    assert 0.03 < sizes["heldout"] / sizes["train"] < 0.3
    shared = {text for text in splits["train"] if text} & set(splits["heldout"])
    assert not shared
    config = DataConfig(dataset=corpus.NAME, shuffle=False)
    assert texts_of(config) == splits["train"]
    assert texts_of(config, "heldout") == splits["heldout"]


def test_the_standard_librarys_files(tmp_path: Path) -> None:
    kept = [f"m{i}.py" for i in range(40)] + ["json/decoder.py"]
    dropped = ["test/test_a.py", "json/tests/b.py", "site-packages/c.py", "encodings/d.py"]
    dropped += ["_sysconfigdata_x.py", "e.txt"]
    for name in kept + dropped:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "latin.py").write_bytes(b"\xe9")
    train = corpus.stdlib_texts("train", tmp_path)
    heldout = corpus.stdlib_texts("heldout", tmp_path)
    assert Counter(train + heldout) == Counter(kept)
    assert train == sorted(train)
    (tmp_path / "m0.py").unlink()
    assert set(corpus.stdlib_texts("heldout", tmp_path)) >= set(heldout) - {"m0.py"}


def test_the_standard_library_has_two_splits_and_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'validation': choose train or heldout"):
        build_documents(DataConfig(dataset=corpus.NAME), "validation")
    with pytest.raises(UserError, match="no Python source"):
        corpus.stdlib_texts("train", tmp_path)


def bad_data(kind: str, folder: Path) -> Path:
    """A data set that cannot be used."""
    folder.mkdir()
    contents: dict[str, tuple[str, bytes]] = {
        "unknown kind": ("a.csv", b"text\nx\n"),
        "no record": ("a.jsonl", b""),
        "another column": ("a.jsonl", b'{"body": "x", "title": "y"}\n'),
        "numbers": ("a.jsonl", b'{"text": 1}\n'),
        "not JSON": ("a.jsonl", b'{"text": \n{"text": \n'),
        "half a character": ("a.jsonl", b'{"text": "a \\ud800"}\n'),
        "numbers in parquet": ("a.parquet", b""),
        "not UTF-8": ("a.txt", b"\xff\xfe\xfa"),
        "damaged parquet": ("a.parquet", b"PAR1 this is none PAR1"),
    }
    if kind == "empty folder":
        return folder
    if kind in ("missing file", "missing relative"):
        return folder / "none.jsonl" if kind == "missing file" else Path("no/such/folder")
    name, content = contents[kind]
    (folder / name).write_bytes(content)
    if kind == "numbers in parquet":
        pq.write_table(pa.table({"text": [1, 2]}), folder / name)
    return folder if kind == "unknown kind" else folder / name


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("missing file", "does not exist"),
        ("missing relative", "does not exist"),
        ("empty folder", "no data file that can be read"),
        ("unknown kind", "no data file that can be read: known are .parquet"),
        ("no record", "no documents"),
        ("another column", "no column 'text': set data.text_key to one of body, title"),
        ("numbers", "holds int, not text"),
        ("not JSON", "cannot read .* all 2 rows are no text.*not JSON"),
        ("half a character", "half a character"),
        ("numbers in parquet", "holds int64, not text"),
        ("not UTF-8", "cannot read"),
        ("damaged parquet", "cannot read"),
    ],
)
def test_unusable_data_is_one_line(
    tmp_path: Path, kind: str, text: str, streaming: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    path = bad_data(kind, tmp_path / "data")
    with pytest.raises(UserError, match=text) as caught:
        texts_of(DataConfig(dataset=str(path), streaming=streaming))
    assert "\n" not in str(caught.value)
    assert path.name in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("streaming", [False, True])
def test_documents_without_text(tmp_path: Path, tokenizer: Any, streaming: bool) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": ""}\n{"text": null}\n' * 8)
    config = DataConfig(dataset=str(path), streaming=streaming, virtual_shards=2)
    documents = build_documents(config, "train")
    if not streaming:
        with pytest.raises(UserError, match="has no text: all its documents are empty"):
            check_enough(documents, tokenizer, config, 8, 2)
    with pytest.raises(UserError, match="virtual shard 0 of 2 .* has no text"):
        next(PackedLoader(documents, tokenizer, config, 8, 1))


def test_fewer_documents_than_virtual_shards(tmp_path: Path, tokenizer: Any) -> None:
    config = DataConfig(dataset=str(write_jsonl(tmp_path / "a.jsonl", ["text"] * 7)))
    documents = build_documents(config, "train")
    with pytest.raises(UserError, match="7 documents, fewer than 8 virtual shards"):
        PackedLoader(documents, tokenizer, config, 8, 1)
    with pytest.raises(UserError, match="7 documents, fewer than 8 virtual shards"):
        check_enough(documents, tokenizer, config, 8, 8)


@pytest.mark.parametrize("repeat", [True, False])
def test_shorter_than_one_global_batch(tmp_path: Path, tokenizer: Any, repeat: bool) -> None:
    """The bound is exact: one token fewer is too short."""
    texts = ["gate gate gate gate"] * 8
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    config = DataConfig(dataset=str(path), repeat=repeat, virtual_shards=4)
    documents = build_documents(config, "train")
    length = len(tokenizer(texts[0])["input_ids"]) + 1
    total = 8 * length
    enough = (total - 1) // 4 if repeat else 2 * length - 1
    check_enough(documents, tokenizer, config, enough, 4)
    loader = PackedLoader(documents, tokenizer, config, enough, 4)
    assert next(loader)[1].shape == (1, 4 * enough)
    loader.close()
    with pytest.raises(UserError, match="shorter than one global batch of 4 sequences"):
        check_enough(documents, tokenizer, config, enough + 1, 4)


@pytest.mark.parametrize(
    ("shards", "world", "batch", "text"),
    [
        (4, 8, 8, "more processes than virtual shards: 8 processes share 4 shards"),
        (8, 3, 9, "3 processes do not divide 8 virtual shards"),
        (0, 1, 8, "virtual_shards is 0"),
        (8, 4, 6, "global batch of 6 is no multiple of 1 sequences on 4 processes"),
    ],
)
def test_data_that_cannot_be_dealt_out(shards: int, world: int, batch: int, text: str) -> None:
    with pytest.raises(UserError, match=text):
        check_order(shards, world, batch)
    check_order(8, 4, 32, local_batch_size=2)


def test_a_loader_checks_the_world_size(tmp_path: Path, tokenizer: Any) -> None:
    config = DataConfig(dataset=str(write_jsonl(tmp_path / "a.jsonl", TEXTS)))
    documents = build_documents(config, "train")
    with pytest.raises(UserError, match="more processes than virtual shards"):
        PackedLoader(documents, tokenizer, config, 8, 1, rank=0, world_size=16)


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize("name", ["someone/something", "something"])
def test_a_hub_name_without_a_network_is_one_line_within_seconds(
    name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    begin = time.monotonic()
    for streaming in (False, True):
        with pytest.raises(UserError, match="cannot be reached from here.*python-stdlib") as data:
            build_documents(DataConfig(dataset=name, streaming=streaming), "train")
        assert "\n" not in str(data.value)
    with pytest.raises(UserError, match="cannot be reached from here") as tokenizer:
        load_tokenizer(name)
    assert "\n" not in str(tokenizer.value)
    assert time.monotonic() - begin < 10
    assert capfd.readouterr() == ("", "")


def test_no_data_named() -> None:
    with pytest.raises(UserError, match="no data: give data.dataset"):
        build_documents(DataConfig(), "train")


def test_reachable_asks_the_host_or_its_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("http_proxy", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert reachable(f"http://127.0.0.1:{port}")
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{port}")
        assert reachable("http://no-such-host.invalid")
    assert not reachable("http://no-such-host.invalid")


def test_a_host_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("http_proxy", raising=False)
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server:
        # With its queue full, the server answers no further connection.
        waiting = [socket.socket() for _ in range(4)]
        for client in waiting:
            client.setblocking(False)
            client.connect_ex(server.getsockname())
        begin = time.monotonic()
        assert not reachable(f"http://127.0.0.1:{server.getsockname()[1]}", timeout=0.5)
        assert 0.4 < time.monotonic() - begin < 5
        for client in waiting:
            client.close()


LOAD = """
import sys
from flame.data.config import DataConfig
from flame.data.sources import build_documents
from flame.data.tokenizer import load_tokenizer
from flame.data.loader import PackedLoader
config = DataConfig(dataset=sys.argv[1], shuffle=False)
loader = PackedLoader(build_documents(config, "train"), load_tokenizer(sys.argv[2]), config, 16, 1)
print(next(loader)[1].sum().item())
"""


def test_two_processes_prepare_one_set_at_once_in_silence(tmp_path: Path) -> None:
    """Nor does a loader that nobody closed keep its process from ending."""
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS * 50)
    tiny_tokenizer(tmp_path / "tokenizer")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home")}
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", LOAD, str(path), str(tmp_path / "tokenizer")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for _ in range(2)
    ]
    outputs = [job.communicate(timeout=120) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], outputs
    assert outputs[0] == outputs[1] and outputs[0][1] == ""


OFFLINE = """
from flame.data.config import DataConfig
from flame.data.sources import build_documents
from flame.data.tokenizer import load_tokenizer
from flame.errors import UserError, report
for load in (
    lambda: build_documents(DataConfig(dataset="someone/something"), "train"),
    lambda: load_tokenizer("someone/something"),
):
    try:
        load()
    except UserError as error:
        report(error)
"""


def test_offline_on_purpose(tmp_path: Path) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE], env=environment, capture_output=True, text=True, timeout=90
    )
    lines = done.stderr.splitlines()
    assert len(lines) == 2, done.stderr
    assert all("HF_HUB_OFFLINE is set" in line for line in lines)
