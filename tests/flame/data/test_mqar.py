"""Generated associative recall: what its documents hold, in which order, and what is predicted."""

import dataclasses
import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flame.data.config import DataConfig
from flame.data.heldout import heldout_sequences
from flame.data.loader import PackedLoader
from flame.data.mqar import (
    FILLER,
    Mqar,
    example_random,
    mqar_documents,
    parse_mqar,
    recall_example,
    without_curriculum,
)
from flame.data.mqar_tokens import Answers, answers_of, mqar_tokenizer
from flame.data.packing import IGNORE_INDEX
from flame.data.sources import build_documents
from flame.data.tokenizer import load_tokenizer
from flame.errors import UserError

NAME = "mqar:pairs=2/5,length=32,keys=12,values=9,every=8,again=1"
CONFIG = DataConfig(dataset=NAME, add_eos=False, virtual_shards=4, seed=3)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return mqar_tokenizer(NAME)


@pytest.mark.parametrize("again", [0, 1])
def test_every_answer_is_the_value_stated_with_its_key(again: int) -> None:
    task = Mqar(pairs=(5,), length=40, keys=8, values=7, again=again)
    for number in range(50):
        example = recall_example(task, 5, example_random(0, "train", number))
        words = example.words
        first = {word: words.index(word) for word in words if word[0] == "k"}
        stated = {key: words[place + 1] for key, place in first.items()}
        asked = Counter(words[place - 1] for place in example.answers)
        assert len(words) == 40
        assert len(stated) == len(set(stated.values())) == 5
        assert set(asked) == set(stated)
        assert all(words[place] == stated[words[place - 1]] for place in example.answers)
        assert words.count(FILLER) == 30 - 2 * len(example.answers)
        assert max(first.values()) < min(example.answers)
        if not again:
            assert max(asked.values()) == 1
            assert FILLER not in words[:10]


def test_keys_values_and_places_of_questions_are_uniform() -> None:
    task = Mqar(pairs=(4,), length=32, keys=8, values=8)
    examples = [recall_example(task, 4, example_random(0, "train", n)) for n in range(2000)]
    for position in (0, 1, 6, 7):
        counts = Counter(example.words[position] for example in examples)
        # 2,000 draws of 8: mean 250, standard deviation 14.8; five of them.
        assert len(counts) == 8
        assert all(abs(count - 250) < 74 for count in counts.values())
    middle = np.mean([place for example in examples for place in example.answers])
    # The answers lie in words 9 to 31; standard deviation of the mean of four of them below 0.1.
    assert abs(middle - 20) < 0.5


def test_example_is_a_function_of_seed_split_and_number() -> None:
    def first(seed: int, split: str, number: int) -> list[str]:
        return mqar_documents(NAME, split, seed).example(number).words

    assert first(0, "train", 5) == first(0, "train", 5)
    others = [first(1, "train", 5), first(0, "validation", 5), first(0, "train", 6)]
    assert first(0, "train", 5) not in others


def test_curriculum_reaches_its_stages_in_turn() -> None:
    documents = mqar_documents("mqar:pairs=2/4/6,length=24,every=100", "train", 0)

    def pairs(first: int) -> Counter:
        return Counter(len(documents.example(n).answers) for n in range(first, first + 100))

    assert pairs(0) == {2: 100}
    assert set(pairs(100)) == {2, 4}
    assert set(pairs(200)) == set(pairs(900)) == {2, 4, 6}
    assert (
        without_curriculum(documents.task.name) == dataclasses.replace(documents.task, every=0).name
    )
    assert without_curriculum("python-stdlib") == "python-stdlib"


def test_name_round_trips() -> None:
    assert parse_mqar(parse_mqar(NAME).name) == parse_mqar(NAME)
    assert parse_mqar("mqar") == Mqar()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mqar:pears=4", "unknown 'pears', choose from pairs, length"),
        ("mqar:pairs=4/x", "'x' is not a whole number"),
        ("mqar:pairs=0", "pairs must be at least 1"),
        ("mqar:keys=0", "keys is 0: it must be at least 1"),
        (
            "mqar:pairs=16,length=63",
            "cannot place 16 pairs in 63 words: .* length of 64, or 15 pairs",
        ),
        ("mqar:pairs=65,length=999", "cannot state 65 pairs with 64 keys"),
    ],
)
def test_impossible_names_are_refused(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_mqar(name)


def test_documents_are_finite_but_for_training() -> None:
    config = dataclasses.replace(CONFIG, dataset=f"{NAME},examples=10")
    assert build_documents(config, "train").size is None
    heldout = build_documents(config, "validation")
    texts = [text for shard in range(4) for text in heldout.shard(shard, 4, 0, 0)]
    assert heldout.size == len(set(texts)) == 10


def test_only_answers_have_labels(tokenizer: Any) -> None:
    documents = mqar_documents(NAME, "train", CONFIG.seed)
    loader = PackedLoader(documents, tokenizer, CONFIG, seq_len=64, local_batch_size=2)
    for step in range(8):
        inputs, labels = next(loader)
        # A row of 64 tokens is two documents of its shard; shard s has the examples s, s + 4, …
        numbers = [
            (2 * ((2 * step + row) // 4) + half) * 4 + (2 * step + row) % 4
            for row in (0, 1)
            for half in (0, 1)
        ]
        examples = [documents.example(number) for number in numbers]
        words = [word for example in examples for word in example.words]
        expected = [IGNORE_INDEX] * 128
        for offset, example in enumerate(examples):
            for place in example.answers:
                answer = tokenizer.convert_tokens_to_ids(example.words[place])
                expected[32 * offset + place - 1] = answer
        assert tokenizer.convert_ids_to_tokens(inputs["input"][0].tolist()) == words
        assert inputs["cu_seqlens"].tolist() == [0, 32, 64, 96, 128]
        assert labels[0].tolist() == expected
    loader.close()


def test_a_key_stated_in_another_document_asks_for_nothing() -> None:
    answers = Answers(keys=(2, 3), values=(4, 5))
    tokens = np.array([2, 4, 3, 5, 2, 4, 2, 4, 3, 5])
    assert np.flatnonzero(answers(tokens, [])).tolist() == [5, 7, 9]
    assert np.flatnonzero(answers(tokens, [6])).tolist() == [5]


def _steps(tokenizer: Any, world_size: int, skip: int, steps: int, state: Any = None) -> Any:
    """The rows of each global batch of 8, and the merged JSON state after the last of them."""
    loaders = [
        PackedLoader(build_documents(CONFIG, "train"), tokenizer, CONFIG, 32, 2, rank, world_size)
        for rank in range(world_size)
    ]
    for loader in loaders:
        if state is not None:
            loader.load_state_dict(json.loads(state))
    batches = []
    for _ in range(skip + steps):
        rows: list[tuple[int, Any]] = []
        for rank, loader in enumerate(loaders):
            for micro in range(4 // world_size):
                inputs, labels = next(loader)
                both = torch.stack([inputs["input"].view(2, 32), labels.view(2, 32)], 1)
                order = [rank + world_size * (2 * micro + row) for row in (0, 1)]
                rows += zip(order, both.tolist(), strict=True)
        batches.append([row for _, row in sorted(rows)])
    merged = PackedLoader.merge_states([loader.state_dict() for loader in loaders])
    for loader in loaders:
        loader.close()
    return batches[skip:], json.dumps(merged)


def test_order_is_the_same_at_every_world_size_and_resumes_at_another(tokenizer: Any) -> None:
    whole, _ = _steps(tokenizer, 1, 0, 6)
    assert _steps(tokenizer, 2, 0, 6)[0] == whole
    for before, after in ((1, 2), (2, 1)):
        first, state = _steps(tokenizer, before, 0, 3)
        assert first + _steps(tokenizer, after, 0, 3, state)[0] == whole
    assert len({str(row) for batch in whole for row in batch}) == 48


def test_tokenizer_is_saved_and_loaded_as_any_other(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    text = next(mqar_documents(NAME, "train", 0).shard(0, 1, 0, 0))
    ids = loaded(text)["input_ids"]
    assert len(ids) == 32
    assert loaded.decode(ids) == text
    assert loaded.vocab_size == 2 + 12 + 9


def test_heldout_rows_predict_answers_alone(tokenizer: Any) -> None:
    config = dataclasses.replace(CONFIG, heldout="mqar:pairs=5,length=32,keys=12,values=9")
    for _, labels, size, _ in islice(heldout_sequences(config, tokenizer, 64), 3):
        assert int((labels != IGNORE_INDEX).sum()) == 10
        assert size == 10 * len(" v0")


def test_tokenizer_without_the_words_is_refused() -> None:
    with pytest.raises(UserError, match="no token for 'k12' of mqar:keys=13"):
        answers_of("mqar:keys=13,values=9,pairs=2", mqar_tokenizer(NAME))
    assert answers_of("python-stdlib", None) is None
