"""Several weighted sources: shares, order at every world size, resume, repeat and stop."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from flame.data.config import DataConfig
from flame.data.documents import StreamedDocuments
from flame.data.files.bad_rows import BadRows
from flame.data.heldout import heldout_sequences
from flame.data.loader import PackedLoader
from flame.data.loader_checks import check_enough
from flame.data.mixing import MixedDocuments, shares, source_configs
from flame.data.sources import build_documents
from flame.errors import UserError
from tests.distributed import run_distributed
from tests.flame.jobs import train_job
from tests.flame.text import listed_documents, tiny_tokenizer

SHARDS = 4
SEQ_LEN = 24
WEIGHTS = (0.6, 0.3, 0.1)
LETTERS = "abc"
COUNTS = (60, 9, 33)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def texts(part: int) -> list[str]:
    """Documents in which the part's letter stands between numbers, each another one."""
    letter = LETTERS[part]
    return [f"{letter} {i} {letter} {i * i} {letter}" * (1 + i % 7) for i in range(COUNTS[part])]


def mixture(config: DataConfig, streamed: bool = True) -> MixedDocuments:
    """A permuted set, a small one, and a stream."""
    import datasets

    parts: list[Any] = [listed_documents(LETTERS[part], texts(part), config) for part in range(3)]
    if streamed:
        rows = datasets.Dataset.from_dict({"text": texts(2)}).to_iterable_dataset()
        parts[2] = StreamedDocuments("c", rows, "text", BadRows("c", "text", 0))
    return MixedDocuments(parts, WEIGHTS)


def make_config(**values: Any) -> DataConfig:
    return DataConfig(virtual_shards=SHARDS, varlen=False, **values)


def loaders(tokenizer: Any, config: DataConfig, world: int, docs: Any = None) -> list[PackedLoader]:
    docs = docs or mixture(config)
    return [PackedLoader(docs, tokenizer, config, SEQ_LEN, 1, rank, world) for rank in range(world)]


def take(own: list[PackedLoader], count: int) -> list[list[int]]:
    """The next `count` sequences of the run, dealt out to the ranks in turn."""
    parts = [list(islice(loader, count // len(own))) for loader in own]
    return [parts[n % len(own)][n // len(own)][0]["input"][0].tolist() for n in range(count)]


def part_of(row: list[int], tokenizer: Any) -> int:
    text = tokenizer.decode(row)
    (part,) = {LETTERS.index(letter) for letter in text if letter in LETTERS}
    return part


@pytest.fixture(scope="module")
def whole(tokenizer: Any) -> list[list[int]]:
    """160 sequences as one process reads them."""
    (loader,) = loaders(tokenizer, make_config(), 1)
    rows = take([loader], 160)
    loader.close()
    return rows


def test_shares_are_the_weights_in_any_stretch(whole: list[list[int]], tokenizer: Any) -> None:
    parts = [part_of(row, tokenizer) for row in whole]
    for start in range(0, 160, 40):
        stretch = parts[start : start + 40]
        for part, weight in enumerate(WEIGHTS):
            assert abs(stretch.count(part) - 40 * weight) <= 2, (start, part)
    # Each virtual shard has its share of all.
    for shard in range(SHARDS):
        own = parts[shard::SHARDS]
        assert all(abs(own.count(p) - 40 * w) <= 3 for p, w in enumerate(WEIGHTS))


def test_a_source_gives_what_it_gives_alone(whole: list[list[int]], tokenizer: Any) -> None:
    """Row for row of each virtual shard, through epochs of the small source."""
    config = make_config()
    docs = mixture(config)
    rows = [(n % SHARDS, part_of(row, tokenizer), row) for n, row in enumerate(whole)]
    for part, alone in enumerate(docs.parts):
        loader = PackedLoader(alone, tokenizer, config, SEQ_LEN, 1)
        expected = take([loader], 120)
        loader.close()
        for shard in range(SHARDS):
            own = [row for s, p, row in rows if (s, p) == (shard, part)]
            assert own == expected[shard::SHARDS][: len(own)]


@pytest.mark.parametrize("world", [2, 4])
def test_every_world_size_reads_the_same(
    whole: list[list[int]], tokenizer: Any, world: int
) -> None:
    own = loaders(tokenizer, make_config(), world)
    assert take(own, 160) == whole
    for loader in own:
        loader.close()


@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 4), (4, 2), (2, 1)])
def test_resumes_at_another_world_size(
    whole: list[list[int]], tokenizer: Any, before: int, after: int
) -> None:
    first = loaders(tokenizer, make_config(), before)
    begin = take(first, 72)
    state = json.loads(
        json.dumps(PackedLoader.merge_states([loader.state_dict() for loader in first]))
    )
    second = loaders(tokenizer, make_config(), after)
    for loader in second:
        loader.load_state_dict(state)
    assert begin + take(second, 88) == whole
    for loader in first + second:
        loader.close()


def test_another_mixture_does_not_resume(tokenizer: Any) -> None:
    config = make_config()
    (loader,) = loaders(tokenizer, config, 1)
    state = loader.state_dict()
    docs = mixture(config)
    docs.weights = (0.5, 0.4, 0.1)
    (other,) = loaders(tokenizer, config, 1, docs)
    with pytest.raises(UserError, match=r"data.weights is \[0.5, 0.4, 0.1\], and was \[0.6"):
        other.load_state_dict(state)
    (single,) = loaders(tokenizer, config, 1, docs.parts[2])
    with pytest.raises(UserError, match="data.sources is None, and was "):
        single.load_state_dict(state)


def test_without_repeat_the_data_end_with_the_first_source(tokenizer: Any) -> None:
    config = make_config(repeat=False)
    (loader,) = loaders(tokenizer, config, 1, mixture(config, streamed=False))
    parts = [part_of(batch[0]["input"][0].tolist(), tokenizer) for batch in loader]
    alone = PackedLoader(loader.documents.parts[1], tokenizer, config, SEQ_LEN, 1)
    assert 0 < parts.count(1) <= len(list(alone)) + SHARDS
    assert abs(parts.count(0) - 2 * parts.count(1)) <= 3


# The recipe ------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for part, key in enumerate(("text", "content", "text")):
        for split in ("train", "validation"):
            lines = [json.dumps({key: text}) for text in texts(part)]
            (tmp_path / f"{LETTERS[part]}-{split}.jsonl").write_text("\n".join(lines))
    return tmp_path


def recipe(folder: Path, **values: Any) -> DataConfig:
    names = [f"{folder}/a-train.jsonl", f"{folder}/b-train.jsonl?text_key=content&max_documents=8"]
    return make_config(sources=names, weights=[3.0, 1.0], **values)


def test_sources_are_read_with_their_own_options(folder: Path) -> None:
    docs = build_documents(recipe(folder), "train")
    assert isinstance(docs, MixedDocuments)
    assert [part.size for part in docs.parts] == [60, 8]
    assert list(docs.weights) == [0.75, 0.25]
    first = list(islice(docs.shard(0, 1, 0, 0), 4))
    assert [text[0] for text in first] == ["a", "b", "a", "b"]
    assert list(islice(docs.shard(0, 1, 0, 2), 2)) == first[2:]


def test_a_resolved_recipe_records_them(folder: Path) -> None:
    import tomllib

    from flame.config import JobConfig, job_from_tables
    from flame.recipe import data_config, recipe_text

    job = JobConfig(data=recipe(folder))
    tables = tomllib.loads(recipe_text(job))
    assert job_from_tables(tables).data == job.data
    assert data_config(tables) == job.data


def test_heldout_text_is_that_of_all_sources(folder: Path, tokenizer: Any) -> None:
    names = [f"{folder}/a-train.jsonl", f"{folder}/b-train.jsonl?text_key=content"]
    config = make_config(sources=names, heldout_split="train[80%:]")
    held = heldout_sequences(config, tokenizer, SEQ_LEN)
    letters = "".join(tokenizer.decode(row[0]["input"][0]) for row in islice(held, 4))
    assert "a" in letters and "b" in letters


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"dataset": "x"}, "data.dataset and data.sources are both given"),
        ({"weights": [1.0]}, "1 numbers for 2 sources"),
        ({"weights": [1.0, 0.0]}, "must be above 0"),
        ({"weights": [1.0, float("nan")]}, "must be above 0"),
        ({"sources": ["a", "b?seed=1"]}, "seed is none of subset, split"),
        ({"sources": ["a", "b?max_documents=x"]}, "max_documents takes a int, not 'x'"),
        ({"sources": ["a", "mqar:pairs=4"]}, "trained on by itself"),
    ],
)
def test_nonsense_is_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        source_configs(make_config(**({"sources": ["a", "b"]} | values)))


def test_shares_add_up_and_default_to_equal_ones() -> None:
    assert shares(make_config(sources=["a", "b"])) == [0.5, 0.5]
    assert shares(make_config(sources=["a", "b"], weights=[1, 3])) == [0.25, 0.75]


def test_a_source_that_is_too_short_is_named(tokenizer: Any) -> None:
    config = make_config(repeat=False)
    with pytest.raises(UserError, match=r"^b is shorter than one global batch"):
        check_enough(mixture(config, streamed=False), tokenizer, config, SEQ_LEN, 120)


def test_a_run_and_its_calibration_draw_on_all_sources(assets: Path, tmp_path: Path) -> None:
    from flame.checkpoint.reference import resolve
    from pruning.calibration.data import calibration_data
    from pruning.options import DataOptions

    text = assets / "text.jsonl"
    sources = [str(text), f"{text}?max_documents=40"]
    options = {"data__dataset": "", "data__sources": sources, "data__weights": [3.0, 1.0]}
    run_distributed(train_job, 2, assets, tmp_path / "run", training__steps=2, **options)
    state = json.loads((tmp_path / "run/checkpoint/step-2/dataloader.json").read_text())
    assert state["weights"] == [0.75, 0.25]
    assert all(len(cursors) == 2 for cursors in state["shards"].values())
    data = calibration_data(resolve(str(tmp_path / "run")), DataOptions(sequences=8, seq_len=64))
    assert [part.size for part in data.documents().parts] == [400, 40]
    assert data.record()["sources"] == sources
