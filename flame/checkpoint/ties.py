"""Tied embeddings by name: which tensor of a checkpoint stands for the output projection too."""

from collections.abc import Iterable, Mapping
from typing import Any

OUTPUT_EMBEDDING = "lm_head.weight"
_INPUT_EMBEDDINGS = ("embeddings", "embed_tokens", "wte", "word_embeddings", "embed_in")


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether a `config.json` says that input and output embedding are one tensor."""
    return bool(config.get("tie_word_embeddings"))


def input_embedding(names: Iterable[str]) -> str | None:
    """The name of the input embedding among a model's tensors, None unless exactly one fits."""
    found = [n for n in names if n.endswith(".weight") and n.split(".")[-2] in _INPUT_EMBEDDINGS]
    return found[0] if len(found) == 1 else None


def own_names(config: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """The names without a tied output embedding, which is the input embedding once more."""
    return [name for name in names if not (is_tied(config) and name == OUTPUT_EMBEDDING)]
