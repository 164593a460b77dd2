"""The text of the tests of damage: rows that are calibrated on, and held-out ones after them."""

from pathlib import Path

from pruning.options import DataOptions

SEQUENCES, HELDOUT, TOKENS = 6, 5, 80


def options_of(home: Path) -> DataOptions:
    data, tokenizer = str(home / "text.jsonl"), str(home / "tokenizer")
    return DataOptions(data=data, tokenizer=tokenizer, sequences=SEQUENCES, seq_len=TOKENS)


def words(home: Path) -> list[str]:
    found = ["--data", str(home / "text.jsonl"), "--tokenizer", str(home / "tokenizer")]
    return [*found, "--sequences", str(SEQUENCES), "--seq-len", str(TOKENS)]
