"""Loading a tokenizer from a folder, once its files were checked and tried."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flame.data.tokenizing.files import check_files
from flame.data.tokenizing.trial import try_tokenizer
from flame.errors import UserError, first_line

FILES = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "*token*.json",
    "*.model",
    "*.tiktoken",
    "config.json",
)
"""Patterns of the files of a tokenizer on the hub."""


def load_folder(path: Path) -> Any:
    """Return the tokenizer of a folder, or of the folder that a file is in.

    Raises:
        UserError: there is none, or it cannot be loaded.
    """
    folder = path if path.is_dir() else path.parent
    if not any(folder.glob("tokenizer*")) and not (folder / "vocab.json").is_file():
        raise UserError(f"{folder} has no tokenizer (tokenizer.json): give data.tokenizer")
    check_files(folder)
    try_tokenizer(folder)
    with one_line(f"cannot load the tokenizer in {folder}"), _without_warnings():
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
        # What is read lazily is read here.
        tokenizer("text"), tokenizer.get_vocab(), tokenizer.eos_token_id, tokenizer.pad_token_id
        return tokenizer


@contextmanager
def one_line(doing: str) -> Iterator[None]:
    """Turn whatever a tokenizer's library raises in the block into a `UserError`."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{doing}: {first_line(error)}") from error
    except BaseException as error:
        # A panic of compiled code derives from BaseException.
        if type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{doing}: {first_line(error)}") from error


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Silence transformers in the block: without fla it warns of unknown model families."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
