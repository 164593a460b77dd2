"""Tokenizers, held-out text and the bytes it stands for."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from flame.data.config import DataConfig
from flame.data.heldout import heldout_sequences
from flame.data.tokenizer import (
    END_OF_TEXT,
    Encoder,
    check_vocabulary,
    load_tokenizer,
    token_bytes,
    train_tokenizer,
)
from flame.errors import UserError
from flame.tokenizer import STAGE
from tests.flame.text import random_texts, tiny_tokenizer, write_jsonl

TEXTS = random_texts(30, seed=2)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_training_is_deterministic_and_every_text_comes_back(tmp_path: Path) -> None:
    for name in ("a", "b"):
        train_tokenizer(iter(TEXTS), 320, tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert "tokenizer.json" in files
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    loaded = load_tokenizer(str(tmp_path / "a"))
    assert loaded.is_fast and 300 < len(loaded) <= 320
    assert (loaded.eos_token, loaded.pad_token) == (END_OF_TEXT, END_OF_TEXT)
    for text in [*TEXTS, "\x00 unseen: ß 漢字 \r\n\t  "]:
        assert loaded.decode(loaded(text)["input_ids"]) == text


def test_the_stage_trains_on_the_texts_of_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_tokenizer(TEXTS, 320, tmp_path / "direct")
    data, out = str(write_jsonl(tmp_path / "texts.jsonl", TEXTS)), tmp_path / "out"
    STAGE.main([str(out), "--size", "320", "--data", data])
    assert capsys.readouterr().out == f"{out}: {len(load_tokenizer(str(out)))} tokens\n"
    for file in (tmp_path / "direct").iterdir():
        assert (out / file.name).read_bytes() == file.read_bytes()
    with pytest.raises(SystemExit):
        STAGE.main([str(out), "--size", "320", "--data", data])
    assert "--overwrite" in capsys.readouterr().err
    STAGE.main([str(out), "--size", "300", "--data", data, "--max-documents", "3", "--overwrite"])
    assert len(load_tokenizer(str(out))) <= 300


def test_a_vocabulary_smaller_than_the_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="256 is too small"):
        train_tokenizer(TEXTS, 256, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_token_ids_beyond_the_vocabulary_are_refused(tokenizer: Any) -> None:
    check_vocabulary(tokenizer, 300)
    with pytest.raises(UserError, match="up to 299, beyond the model's vocabulary of 299"):
        check_vocabulary(tokenizer, 299)


def test_a_padding_token_beyond_the_vocabulary_is_no_obstacle(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    assert tokenizer.pad_token_id == 300
    check_vocabulary(tokenizer, 300)


def test_documents_are_closed_and_empty_ones_have_nothing(tokenizer: Any) -> None:
    eos = tokenizer.eos_token_id
    closed = [ids.tolist() for ids in Encoder(tokenizer, True).stream(iter(["a b", "", "c"]))]
    plain = [ids.tolist() for ids in Encoder(tokenizer, False).stream(iter(["a b", "", "c"]))]
    assert closed == [[*plain[0], eos], [], [*plain[2], eos]]
    assert plain[1] == []


def test_a_long_text_is_not_truncated(tokenizer: Any) -> None:
    text = "gate " * 100_000
    (ids,) = Encoder(tokenizer, False).stream(iter([text]))
    assert tokenizer.decode(ids.tolist()) == text


def test_no_end_of_text_token_is_refused_only_where_one_is_needed(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path)
    tokenizer.eos_token = None
    Encoder(tokenizer, False)
    with pytest.raises(UserError, match="data.add_eos"):
        Encoder(tokenizer, True)


def test_bytes_of_tokens_sum_to_the_text(tokenizer: Any) -> None:
    texts = [*TEXTS, "🙂🙂 é", "\n\n", "é"]
    for text, array in zip(
        texts, Encoder(tokenizer, True).stream_with_bytes(iter(texts)), strict=True
    ):
        assert array.shape[0] == 2
        assert array[1].sum() == len(text.encode())
        assert (array[1] >= 0).all()
        for ids, size in array.T[:-1]:
            plain = tokenizer.convert_ids_to_tokens(int(ids))
            assert size == len(plain) or any(ord(c) > 127 for c in text)


def test_characters_that_no_span_covers_are_counted() -> None:
    assert token_bytes("  é x ", [(2, 3), (4, 5)]).tolist() == [4, 3]
    assert token_bytes("", []).tolist() == []


@pytest.mark.parametrize("seq_len", [16, 64, 10_000])
def test_held_out_bytes_equal_the_decoded_text(
    tokenizer: Any, tmp_path: Path, seq_len: int
) -> None:
    """Each token is predicted once but for the first of a document, and its bytes are counted."""
    path = write_jsonl(tmp_path / "text.jsonl", TEXTS)
    config = DataConfig(heldout=str(path))
    items = list(heldout_sequences(config, tokenizer, seq_len))
    counted = sum(n_bytes for _, _, n_bytes, _ in items)
    labels = torch.cat([labels[0] for _, labels, *_ in items])
    ids = [int(i) for i in labels if i not in (-100, tokenizer.eos_token_id)]
    wanted = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    assert ids == [i for document in wanted for i in document[1:]]
    assert counted == sum(
        len(text.encode()) - len(first_character(tokenizer, text)) for text in TEXTS if text
    )


def first_character(tokenizer: Any, text: str) -> bytes:
    """The characters that the first token of `text` is of, in whole."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return text[: encoded["offset_mapping"][0][1]].encode()


def test_held_out_rows_are_batches_like_the_loaders(tokenizer: Any, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "text.jsonl", TEXTS)
    items = list(heldout_sequences(DataConfig(heldout=str(path)), tokenizer, 32))
    for batch, labels, *_ in items[:-1]:
        assert batch["input"].shape == labels.shape == (1, 32)
    for batch, labels, *_ in items:
        bounds = batch["cu_seqlens"]
        assert bounds[0] == 0 and bounds[-1] == labels.numel() and torch.all(bounds.diff() > 0)
    assert 1 <= items[-1][1].numel() <= 32
    again = heldout_sequences(DataConfig(heldout=str(path)), tokenizer, 32, max_sequences=3)
    assert [b["input"].tolist() for b, *_ in again] == [b["input"].tolist() for b, *_ in items[:3]]


def test_held_out_without_varlen_counts_every_token_but_the_very_first(
    tokenizer: Any, tmp_path: Path
) -> None:
    path = write_jsonl(tmp_path / "text.jsonl", ["abc", "def"])
    config = DataConfig(heldout=str(path), varlen=False)
    ((batch, labels, n_bytes, _),) = heldout_sequences(config, tokenizer, 32)
    assert set(batch) == {"input"}
    first = len(tokenizer.decode(batch["input"][0, :1].tolist()))
    assert n_bytes == 6 - first and (labels != -100).all()


def test_the_held_out_set_of_a_folder_is_named_or_a_slice(tokenizer: Any, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", [*["seen " * 20] * 3, "held out"])
    with pytest.raises(UserError, match="no split 'validation'.*data.heldout"):
        heldout_sequences(DataConfig(dataset=str(folder)), tokenizer, 8)
    config = DataConfig(dataset=str(folder), heldout_split="train[75%:]")
    ((batch, *_),) = heldout_sequences(config, tokenizer, 64)
    assert tokenizer.decode(batch["input"][0].tolist()) == "held out"


def test_held_out_text_without_text_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "text.jsonl", ["", ""])
    with pytest.raises(UserError, match="no text to evaluate on"):
        heldout_sequences(DataConfig(heldout=str(path)), tokenizer, 8)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("", "no tokenizer"),
        ("/nowhere/tokenizer", "does not exist"),
        ("./missing", "does not exist"),
    ],
)
def test_a_missing_tokenizer_is_one_line(name: str, text: str) -> None:
    with pytest.raises(UserError, match=text) as caught:
        load_tokenizer(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, "{", '{"version": "1.0"}'])
def test_a_folder_without_a_readable_tokenizer_is_one_line(
    tmp_path: Path, content: str | None
) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
        (tmp_path / "tokenizer_config.json").write_text(
            '{"tokenizer_class": "PreTrainedTokenizerFast"}'
        )
    with pytest.raises(UserError, match="tokenizer") as caught:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_text_that_spells_a_special_token_is_plain_text(tokenizer: Any, tmp_path: Path) -> None:
    """Also one that lies behind the model's embedding, as padding tokens do that users add."""
    tokenizer.save_pretrained(str(tmp_path))
    padded = load_tokenizer(str(tmp_path))
    padded.add_special_tokens({"pad_token": "<pad>"})
    padded.save_pretrained(str(tmp_path))
    padded = load_tokenizer(str(tmp_path))
    size = len(tokenizer)
    assert padded.pad_token_id >= size
    check_vocabulary(padded, size)
    text = f"a <pad> b {END_OF_TEXT} c"
    (ids,) = Encoder(padded, True).stream(iter([text]))
    assert ids.max() < size
    assert (ids == padded.eos_token_id).tolist() == [False] * (ids.size - 1) + [True]
    assert padded.decode(ids[:-1]) == text
    ((_, sizes),) = Encoder(padded, False).stream_with_bytes(iter([text]))
    assert sizes.sum() == len(text)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"normalizer": {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}},
         "its normalizers make more than 64 characters of one"),
        ({"normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Replace", "pattern": {"String": "a"}, "content": "aaaaaaaa"}] * 3}},
         "its normalizers make more than 64"),
        ({"normalizer": {"type": "Prepend", "prepend": "a" * 10**6}}, "puts more than 64"),
        ({"normalizer": {"type": "Unknown"}}, "cannot load the tokenizer"),
        ({"added_tokens": [{"id": -1, "content": "x"}]}, "cannot load the tokenizer"),
        ({"added_tokens": [{"id": "0", "content": "x"}]}, r"added_tokens\[0\].id is '0'"),
        ({"model": []}, "model is a list, not a table"),
    ],
)  # fmt: skip
def test_a_damaged_tokenizer_is_one_line(
    tokenizer: Any, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    tokenizer.save_pretrained(str(tmp_path))
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(UserError, match=words) as caught:
        load_tokenizer(str(tmp_path))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_ids_are_those_of_the_tokenizers_own_call_whatever_was_set_before(tokenizer: Any) -> None:
    """A class that encodes in its own way is asked itself."""
    texts = ["", *TEXTS, f"spelled: {END_OF_TEXT}", "long " * 500]
    options = {"add_special_tokens": False, "split_special_tokens": True}
    expected = [[*ids, 0] if ids else [] for ids in tokenizer(texts, **options)["input_ids"]]
    # These leave truncation, padding and special tokens set in the backend.
    tokenizer(texts, truncation=True, max_length=4, padding="max_length")
    assert [ids.tolist() for ids in Encoder(tokenizer, True).stream(iter(texts))] == expected

    class Reversed(type(tokenizer)):  # type: ignore[misc]
        def _encode_plus(self, *given: Any, **options: Any) -> Any:
            found = super()._encode_plus(*given, **options)
            found["input_ids"] = [ids[::-1] for ids in found["input_ids"]]
            return found

    own = Reversed(tokenizer_object=tokenizer.backend_tokenizer, eos_token=END_OF_TEXT)
    (ids,) = Encoder(own, False).stream(iter(["long"]))
    assert ids.tolist() == tokenizer("long", **options)["input_ids"][::-1]
