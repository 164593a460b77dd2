"""One table compares models on one text: the same set, rows of one length, the same tokens."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flame.checkpoint.reference import ModelReference
from flame.errors import UserError
from flame.hugging_face.config_file import keeps_documents_apart, vocabulary_size
from launch.evaluation.heldout_text import (
    HeldoutOptions,
    HeldoutText,
    check_text,
    heldout_text,
)


@dataclass(frozen=True)
class SameText:
    """The held-out text of several models, the same for all but for where the tokenizer lies."""

    by_model: Mapping[str, HeldoutText]
    """By the names of the models."""

    apart: bool | None
    """False if some models keep packed documents apart and others cannot: all read a row as one
    text then. None leaves each its own way."""

    def facts(self) -> dict[str, Any]:
        """What results on the text depend on, as plain data."""
        return {**next(iter(self.by_model.values())).facts, "apart": self.apart}


def same_text(references: Mapping[str, ModelReference], options: HeldoutOptions) -> SameText:
    """The text that `options` and the recipes of all models name.

    Args:
        references: the models by name, at least one.
        options: which text; what they leave open is each recipe's to say.

    Raises:
        UserError: a model has no text, or two models have different sets or lengths of rows.
    """
    texts = {name: heldout_text(reference, options) for name, reference in references.items()}
    first, *others = texts
    for other in others:
        _check_same(first, texts[first], other, texts[other])
    return SameText(texts, _apart([reference.config for reference in references.values()]))


def check_same_tokens(
    references: Mapping[str, ModelReference], found: SameText, from_recipe: bool
) -> None:
    """Refuse a text that a model cannot be evaluated on, or that two cut into different tokens.

    It reads the first row of each.

    Raises:
        UserError: as `check_text` does, or the tokens differ.
    """
    import torch

    seen: dict[str, Any] = {}
    for name, text in found.by_model.items():
        labels = check_text(text, vocabulary_size(references[name].config), from_recipe)
        for other, theirs in seen.items():
            if not torch.equal(labels, theirs):
                raise UserError(
                    f"{other} and {name} have different tokenizers: perplexity a token does not "
                    "compare between them; evaluate them apart, and compare bits per byte"
                )
        seen[name] = labels


def _apart(configs: list[dict[str, Any]]) -> bool | None:
    # One family has one way; to ask for it takes the seconds that importing fla does.
    if len({config["model_type"] for config in configs}) == 1:
        return None
    return None if len(set(map(keeps_documents_apart, configs))) == 1 else False


def _check_same(first: str, one: HeldoutText, second: str, other: HeldoutText) -> None:
    if one.seq_len != other.seq_len:
        raise UserError(
            f"{first} would read rows of {one.seq_len:,} tokens and {second} of "
            f"{other.seq_len:,}, which do not compare: give --seq-len N for both"
        )
    theirs = other.facts
    for key, value in one.facts.items():
        if theirs[key] != value:
            raise UserError(
                f"{first} would be measured on {one.name} and {second} on {other.name} "
                f"({key} {value!r} and {theirs[key]!r}): give --perplexity DATA for both"
            )
