"""Tied embeddings: which tensor of a checkpoint is the output embedding too, by its name."""

from collections.abc import Iterable, Mapping
from typing import Any

OUTPUT_EMBEDDING = "lm_head.weight"
_INPUT_EMBEDDINGS = ("embeddings", "embed_tokens", "wte", "word_embeddings", "embed_in")


def is_tied(config: Mapping[str, Any]) -> bool:
    """Return whether a `config.json` makes input and output embedding one tensor.

    A config without the key has the default of its class. Raises `UserError` where the class is
    needed and unknown.
    """
    if "tie_word_embeddings" in config:
        return bool(config["tie_word_embeddings"])
    from flame.model import stock_config

    return bool(getattr(stock_config(dict(config)), "tie_word_embeddings", False))


def input_embedding(names: Iterable[str]) -> str | None:
    """Return the input embedding's name among a model's tensors, None unless exactly one fits."""
    found = [n for n in names if n.endswith(".weight") and n.split(".")[-2] in _INPUT_EMBEDDINGS]
    return found[0] if len(found) == 1 else None


def own_names(config: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Return `names` without a tied output embedding that repeats an input embedding among them."""
    names = list(names)
    if OUTPUT_EMBEDDING not in names or input_embedding(names) is None or not is_tied(config):
        return names
    return [name for name in names if name != OUTPUT_EMBEDDING]
