"""What is checked of models before they are measured: names, families, tokenizers, lengths."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flame.checkpoint.reference import ModelReference
from flame.errors import UserError
from flame.hugging_face.config_file import keeps_documents_apart, vocabulary_size
from launch.evaluation.heldout_text import tokenizer_name


def check_tokenizer(reference: ModelReference, given: str) -> None:
    """Refuse a model whose tokenizer is missing, or has tokens that the model does not.

    Raises:
        UserError: either is the case, or the tokenizer has no end-of-text token.
    """
    from flame.data.tokenizer import check_vocabulary, load_tokenizer

    tokenizer = load_tokenizer(tokenizer_name(reference, given))
    check_vocabulary(tokenizer, vocabulary_size(reference.config))
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer of {reference.folder} has no end-of-text token, which tasks begin and "
            "end on: give --tokenizer FOLDER"
        )


def check_family(config: dict[str, Any]) -> None:
    """Raise UserError for a model family that transformers and fla do not know.

    A family with an adapter passes without the seconds that importing fla takes.
    """
    from pruning.adapters import ADAPTERS

    if config["model_type"] not in ADAPTERS:
        from flame.model import stock_config

        stock_config(config)


def check_length(config: Mapping[str, Any], max_length: int | None) -> None:
    """Raise UserError if `max_length` is beyond the positions of a stock attention model.

    fla's and this project's models are not checked, nor is a config without
    `max_position_embeddings` or a `max_length` of None.
    """
    from pruning.adapters import ADAPTERS

    positions = config.get("max_position_embeddings")
    if max_length is None or not isinstance(positions, int) or max_length <= positions:
        return
    if config["model_type"] not in ADAPTERS and not keeps_documents_apart(dict(config)):
        raise UserError(
            f"--max-length {max_length} is beyond the {positions} positions of this "
            f"{config['model_type']} model: give at most {positions}"
        )


def check_same_length(references: Mapping[str, ModelReference], given: str) -> None:
    """Refuse models that tasks would be shown at different lengths.

    Args:
        references: the models by name.
        given: the tokenizer of all of them; empty for each one's own.
    """
    from lm_eval.models.utils import resolve_max_length

    from flame.data.tokenizer import load_tokenizer
    from flame.model import stock_config

    lengths = {
        name: resolve_max_length(
            stock_config(reference.config), load_tokenizer(tokenizer_name(reference, given))
        )
        for name, reference in references.items()
    }
    for name, length in lengths.items():
        first, its = next(iter(lengths.items()))
        if length != its:
            raise UserError(
                f"tasks would show {first} at most {its:,} tokens at once and {name} {length:,}, "
                "which does not compare: give --max-length N for both"
            )


def expanded(models: Sequence[str]) -> list[str]:
    """Model names with patterns such as `'RUN/checkpoint/step-*'` resolved, steps in order.

    Raises:
        UserError: a pattern matches no folder, or a model is named twice.
    """
    names: list[str] = []
    for model in models:
        names += _matches(model) if set(model) & set("*?[") else [model]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"model {name} is named twice")
    return names


def _matches(pattern: str) -> list[str]:
    import glob
    import re

    if Path(pattern).exists():
        return [pattern]
    found = [path for path in glob.glob(str(Path(pattern).expanduser())) if Path(path).is_dir()]
    if not found:
        raise UserError(f"no model at {pattern}: no folder matches")
    return sorted(found, key=lambda path: [int(n) for n in re.findall(r"\d+", path)] or [0])
