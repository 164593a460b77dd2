"""Streams of files: what is read, by whom, and where a run goes on."""

import json
import random
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flame.data.config import DataConfig
from flame.data.files.dealt import DealtDocuments
from flame.data.files.parquet import _read_footer, footer
from flame.data.loader import PackedLoader
from flame.data.sources import build_documents, files_of_builder
from flame.errors import UserError
from tests.flame.text import random_texts, tiny_tokenizer, write_jsonl

FILES = 14


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    import datasets

    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fourteen files of 3 to 5 MB that do not compress, in uneven row groups.

    They have no statistics, which would make the footers 5 % of files as small as these.
    """
    folder, draw = tmp_path_factory.mktemp("parquet"), random.Random(0)
    for number in range(FILES):
        schema = pa.schema([("text", pa.string()), ("id", pa.int64())])
        path = folder / f"{number:02}.parquet"
        with pq.ParquetWriter(path, schema, write_statistics=False) as writer:
            for group in range(draw.randrange(10, 26)):
                rows = draw.randrange(20, 120)
                texts = [
                    f"{number} {group} {row} {draw.randbytes(1500).hex()}" for row in range(rows)
                ]
                writer.write_table(pa.table({"text": texts, "id": range(rows)}, schema=schema))
    return folder


def stream(path: Path, **values: Any) -> DealtDocuments:
    documents = build_documents(DataConfig(dataset=str(path), streaming=True, **values), "train")
    assert isinstance(documents, DealtDocuments)
    return documents


def bytes_read() -> int:
    """Bytes that this process has asked the system for."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(lines[0].removeprefix("rchar: "))


def stored(path: Path) -> int:
    """Bytes of all text columns."""
    metadata = [footer(str(file)) for file in sorted(path.iterdir())]
    groups = [m.row_group(g) for m in metadata for g in range(m.num_row_groups)]
    return sum(group.column(0).total_compressed_size for group in groups)


@pytest.mark.parametrize(("shards", "world"), [(1, 1), (8, 1), (8, 8), (64, 1), (64, 8)])
def test_all_ranks_together_read_what_they_consume(parquet: Path, shards: int, world: int) -> None:
    stream(parquet)  # As a job's checks do, which read the footers and keep them for the ranks.
    consumed = stored(parquet)
    begin, texts = bytes_read(), 0
    for rank in range(world):
        _read_footer.cache_clear()
        documents = stream(parquet)
        for shard in range(rank, shards, world):
            texts += sum(1 for _ in documents.shard(shard, shards, 0, 0))
    read = bytes_read() - begin
    rows = sum(footer(str(file)).num_rows for file in parquet.iterdir())
    assert texts == rows
    assert consumed <= read <= 1.1 * consumed, read / consumed


@pytest.mark.parametrize("shards", [1, 8, 64])
def test_shards_get_equal_parts(parquet: Path, shards: int) -> None:
    """To one row group, as each goes to the shard with the fewest rows."""
    documents = stream(parquet)
    own = [sum(s.block.weight for s in dealt) for dealt in documents._shares(shards)]
    largest = max(block.weight for block in documents.blocks)
    assert max(own) - min(own) <= largest


@pytest.mark.parametrize("shards", [1, 8, 64])
def test_a_resume_reads_no_more_than_one_row_group_of_what_was_passed(
    parquet: Path, tokenizer: Any, shards: int
) -> None:
    """Each shard goes on at nine tenths of its documents, in the middle of a row group."""
    documents = stream(parquet)
    sizes = {
        (str(file), g): footer(str(file)).row_group(g).column(0).total_compressed_size
        for file in parquet.iterdir()
        for g in range(footer(str(file)).num_row_groups)
    }
    for shard in range(0, shards, 7):
        rows = [share.block.weight for share in documents._shares(shards)[shard]]
        block, document, left = 0, 0, sum(rows) * 9 // 10
        while left > rows[block]:
            left -= rows[block]
            block += 1
        document = left // 2
        expected = list(documents.block(shard, shards, block, 0))[document]
        begin = bytes_read()
        found = next(documents.block(shard, shards, block, document))
        read = bytes_read() - begin
        place = documents._shares(shards)[shard][block].block.place
        assert found == expected
        assert read <= sizes[place] + 2**16


@pytest.mark.parametrize("form", ["parquet", "jsonl", "few"])
@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 4), (4, 2), (2, 8), (8, 1)])
def test_every_world_size_reads_the_same_and_resumes(
    tmp_path: Path, tokenizer: Any, form: str, before: int, after: int
) -> None:
    """Through blocks, documents and epochs; `few` has fewer blocks than shards."""
    texts = random_texts(120, seed=6)
    folder = tmp_path / "data"
    folder.mkdir()
    if form == "parquet":
        for n in range(4):
            table = pa.table({"text": texts[n * 30 : n * 30 + 30]})
            pq.write_table(table, folder / f"{n}.parquet", row_group_size=5 + n)
    elif form == "few":
        write_jsonl(folder / "a.jsonl", texts)
    else:
        for n in range(10):
            write_jsonl(folder / f"{n}.jsonl", texts[n * 12 : n * 12 + 12])
    config = DataConfig(dataset=str(folder), streaming=True, varlen=False)

    def sequences(world: int, state: dict[str, Any] | None, count: int) -> tuple[list, dict]:
        documents = [build_documents(config, "train") for _ in range(world)]
        loaders = [
            PackedLoader(documents[rank], tokenizer, config, 24, 1, rank, world)
            for rank in range(world)
        ]
        first = state["next_sequence"] if state else 0
        for loader in loaders:
            if state:
                loader.load_state_dict(state)
        rows = [next(loaders[n % world])[0]["input"].tolist() for n in range(first, first + count)]
        merged = PackedLoader.merge_states([loader.state_dict() for loader in loaders])
        for loader in loaders:
            loader.close()
        return rows, json.loads(json.dumps(merged))

    whole, end = sequences(1, None, 800)
    assert all(position[0] >= 1 for position in end["shards"].values())
    for taken in (24, 104, 640):
        rows, state = sequences(before, None, taken)
        assert rows == whole[:taken]
        assert sequences(after, state, 800 - taken)[0] == whole[taken:]


def test_a_shard_holds_each_document_once(tmp_path: Path) -> None:
    texts = [f"{n} {'x' * (n % 700)}" for n in range(3000)]
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    documents = stream(path)
    assert len(documents.blocks) > 8
    shards = [list(documents.shard(shard, 8, 0, 0)) for shard in range(8)]
    assert sorted(text for own in shards for text in own) == sorted(texts)


def test_positions_of_the_old_order_and_of_other_files_are_refused(
    tmp_path: Path, tokenizer: Any
) -> None:
    config = DataConfig(dataset=str(tmp_path), streaming=True, virtual_shards=2)
    write_jsonl(tmp_path / "a.jsonl", random_texts(40, seed=1))
    loader = PackedLoader(build_documents(config, "train"), tokenizer, config, 8, 1)
    next(loader)
    state = loader.state_dict()
    loader.close()
    with pytest.raises(UserError, match="read streams in another order.*--init"):
        loader.load_state_dict({key: state[key] for key in state if key != "layout"})
    write_jsonl(tmp_path / "b.jsonl", random_texts(5, seed=2))
    other = PackedLoader(build_documents(config, "train"), tokenizer, config, 8, 1)
    with pytest.raises(UserError, match="files of data.dataset.* are not those of the run"):
        other.load_state_dict(state)
    config.streaming = False
    indexed = PackedLoader(build_documents(config, "train"), tokenizer, config, 8, 1)
    with pytest.raises(UserError, match="number of documents|data.streaming was true"):
        indexed.load_state_dict(state)


def test_a_moved_folder_resumes(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    for n in range(3):
        write_jsonl(tmp_path / "one" / f"{n}.jsonl", random_texts(9, seed=n))
    before = stream(tmp_path / "one").layout
    (tmp_path / "one").rename(tmp_path / "two")
    assert stream(tmp_path / "two").layout == before


def test_files_that_the_library_finds_are_dealt_out(parquet: Path) -> None:
    """A hub name is resolved to files by `datasets`, whose builder of a folder is the same."""
    import datasets

    builder = datasets.load_dataset_builder(str(parquet))
    found = files_of_builder(builder, "train")
    assert found is not None and found[0] == "parquet"
    assert sorted(Path(file).name for file in found[1]) == [f"{n:02}.parquet" for n in range(FILES)]
    with pytest.raises(UserError, match="no split 'test': choose from train"):
        files_of_builder(builder, "test")


def test_only_the_first_documents_are_dealt(parquet: Path) -> None:
    documents = stream(parquet, max_documents=300)
    whole = list(islice(stream(parquet).shard(0, 1, 0, 0), 300))
    shards = [list(documents.shard(shard, 8, 0, 0)) for shard in range(8)]
    assert sorted(text for own in shards for text in own) == sorted(whole)
