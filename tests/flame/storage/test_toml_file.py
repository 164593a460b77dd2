"""One reader of TOML files: tables, or one line that names the file."""

from pathlib import Path

import pytest

from flame.errors import UserError
from flame.storage.toml_file import LARGEST, read_toml


@pytest.mark.parametrize(
    "content",
    [
        b"a =",
        b"\x80\x04",
        b"a = " + b"9" * 5000,
        b"a = " + b"[" * 100_000,
        b"a = " + b"[" * 40 + b"]" * 40,
        b"a." * 100_000 + b"b = 1",
        b'"a" . ' * 100_000 + b"b = 1",
        b"[" + b"a." * 100_000 + b"b]",
        b"#" * (LARGEST + 1),
    ],
    ids=[
        "cut short",
        "not text",
        "number too long",
        "too deep for the parser",
        "too deep",
        "long key",
        "long quoted key",
        "long header",
        "too large",
    ],
)
def test_files_without_tables_are_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "some.toml"
    file.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_toml(file, "recipe")
    assert str(file) in str(error.value) and "\n" not in str(error.value)


def test_tables_are_read_and_a_missing_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "some.toml"
    file.write_text("[a.b]\r\nc = 1\n[d]\ne = '" + "1." * 20 + "'\n")
    assert read_toml(file) == {"a": {"b": {"c": 1}}, "d": {"e": "1." * 20}}
    with pytest.raises(UserError, match=f"recipe {tmp_path}"):
        read_toml(tmp_path / "none.toml", "recipe")
