"""Digests by which a run knows its text and its tokenizer again, wherever they lie."""

import hashlib
import json
from itertools import islice
from typing import Any

from flame.data.documents import Documents
from flame.data.mixing import parts_of

SAMPLED = 64
"""Documents of each set that are hashed, in the order of its first epoch."""


def text_digest(documents: Documents) -> str:
    """Return 64 hexadecimal digits for the number of documents and a sample of them.

    Equal for the same documents in the same order, whatever their files are called. Of a set that
    is shuffled the sample is random, but the same each time; else it is the set's beginning.
    """
    hasher = hashlib.sha256()
    for part in parts_of(documents):
        hasher.update(f"\n{part.size}\n".encode())
        for text in islice(part.shard(0, 1, 0, 0), SAMPLED):
            content = text.encode(errors="surrogatepass")
            hasher.update(f"{len(content)} ".encode() + content)
    return hasher.hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """Return 64 hexadecimal digits; equal for tokenizers that give the same ids and end of text."""
    hasher = hashlib.sha256(str(tokenizer.eos_token_id).encode())
    if tokenizer.is_fast:
        parts = json.loads(tokenizer.backend_tokenizer.to_str())
        # How batches are cut and padded is set by callers, and not used here.
        parts = {key: part for key, part in parts.items() if key not in ("truncation", "padding")}
        hasher.update(json.dumps(parts, sort_keys=True).encode())
    else:
        hasher.update(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode())
    return hasher.hexdigest()
