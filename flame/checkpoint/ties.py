"""Tied embeddings: which tensor of a checkpoint is the output embedding too, by its name."""

from collections.abc import Iterable, Mapping
from typing import Any

OUTPUT_EMBEDDING = "lm_head.weight"
_INPUT_EMBEDDINGS = ("embeddings", "embed_tokens", "wte", "word_embeddings", "embed_in")


def is_tied(config: Mapping[str, Any]) -> bool:
    """Return whether a `config.json` says that input and output embedding are one tensor."""
    return bool(config.get("tie_word_embeddings"))


def input_embedding(names: Iterable[str]) -> str | None:
    """Return the input embedding's name among a model's tensors, None unless exactly one fits."""
    found = [n for n in names if n.endswith(".weight") and n.split(".")[-2] in _INPUT_EMBEDDINGS]
    return found[0] if len(found) == 1 else None


def own_names(config: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Return `names` without a tied output embedding, which repeats the input embedding."""
    return [name for name in names if not (is_tied(config) and name == OUTPUT_EMBEDDING)]
