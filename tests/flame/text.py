"""Small corpora and tokenizers for the data tests."""

import json
import random
from pathlib import Path
from typing import Any

from flame.data.config import DataConfig
from flame.data.documents import IndexedDocuments
from flame.data.tokenizer import train_tokenizer

WORDS = "the état of a recurrence, key value gate 数 decays\n\tand λ returns 🙂 twice".split(" ")


def random_texts(count: int, seed: int = 0, longest: int = 60) -> list[str]:
    """Texts of 0 to `longest` words, some of them empty, some with characters of many bytes."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randrange(longest))) for _ in range(count)]


def listed_documents(name: str, texts: list[str], config: DataConfig) -> IndexedDocuments:
    """A set of these documents, in the order that `config` asks for."""
    return IndexedDocuments(
        name, len(texts), lambda numbers: [texts[n] for n in numbers], config.shuffle, config.seed
    )


def write_jsonl(path: Path, texts: list[str], key: str = "text") -> Path:
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts))
    return path


def tiny_tokenizer(folder: Path) -> Any:
    return train_tokenizer(random_texts(50, seed=1), 300, folder)
