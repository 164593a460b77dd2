"""One reader of JSON files: an object, or one line that names the file."""

import os
from pathlib import Path

import pytest

from flame.errors import UserError
from flame.storage.json_file import DEEPEST, LARGEST, read_object, read_object_if_any


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\x80\x04",
        b"[1]",
        b"null",
        b"1" * 5000,
        b'{"a": 1' + b"0" * 400 + b"}",
        b"[" * 100_000,
        b'{"a":' * 65 + b"1" + b"}" * 65,
        b'{"a": [' + b"[]," * 2_000_000 + b"[]]}",
        b'{"a": "\\ud800"}',
        b'{"\\udfff": 1}',
        b" " * (LARGEST + 1),
    ],
    ids=[
        "empty",
        "cut short",
        "not text",
        "list",
        "null",
        "number too long",
        "number beyond a float",
        "too deep for the parser",
        "too deep",
        "too many values",
        "half a character",
        "half a character as key",
        "too large",
    ],
)
def test_files_without_an_object_are_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "some.json"
    file.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_object(file)
    assert str(file) in str(error.value) and "\n" not in str(error.value)
    assert read_object_if_any(file) == {}


def test_pipes_are_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    for path in (tmp_path / "pipe.json", Path("/dev/zero"), tmp_path):
        with pytest.raises(UserError, match="regular file|directory"):
            read_object(path)


def test_depth_within_the_bound_is_read(tmp_path: Path) -> None:
    file = tmp_path / "some.json"
    file.write_text('{"a":' * DEEPEST + "1" + "}" * DEEPEST)
    assert list(read_object(file)) == ["a"]


def test_an_object_is_read(tmp_path: Path) -> None:
    file = tmp_path / "some.json"
    file.write_text('{"key": [1, "é"]}', encoding="utf-8")
    assert read_object(file) == read_object_if_any(file) == {"key": [1, "é"]}


def test_a_missing_file_is_named_in_the_caller_s_words(tmp_path: Path) -> None:
    file = tmp_path / "some.json"
    with pytest.raises(UserError, match=r"some\.json"):
        read_object(file)
    with pytest.raises(UserError, match="^train it first$"):
        read_object(file, "train it first")
    with pytest.raises(UserError, match=str(tmp_path)):
        read_object(tmp_path, "train it first")
    assert read_object_if_any(file) == {}


def test_what_a_hook_refuses_is_said(tmp_path: Path) -> None:
    def refuse(name: str) -> None:
        raise ValueError(f"{name} is refused")

    file = tmp_path / "some.json"
    file.write_text('{"key": NaN}')
    with pytest.raises(UserError, match=r"some\.json: NaN is refused"):
        read_object(file, parse_constant=refuse)
