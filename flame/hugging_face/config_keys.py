"""Keys of a `config.json` that its class does not know, and so ignores without a word."""

import difflib
import inspect
import logging
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cache
from typing import Any

_OF_OTHERS = frozenset({
    "auto_map", "custom_pipelines", "quantization_config", "transformers_weights", "torch_dtype",
    "rope_theta", "rope_scaling", "partial_rotary_factor", "pruned_heads", "torchscript",
    "is_decoder", "add_cross_attention", "cross_attention_hidden_size", "tie_encoder_decoder",
    "tie_word_embeddings", "use_bfloat16", "tf_legacy_loss", "finetuning_task", "prefix",
    "task_specific_params", "tokenizer_class", "attn_implementation", "use_cache", "model_type",
    "unsloth_version", "unsloth_fixed", "pad_token_id", "bos_token_id", "eos_token_id",
    "sep_token_id", "decoder_start_token_id", "linear_attn_config",
    "index_topk_pattern", "index_topk_freq", "index_skip_topk_offset", "num_nextn_predict_layers",
})  # fmt: skip
"""Keys that every config may have: those of transformers itself, of now and of earlier versions."""

log = logging.getLogger(__name__)


def warn_of_unknown_keys(stock: Any, config: Mapping[str, Any]) -> None:
    """Warn, once, of keys that a configuration class ignores, with the nearest name that it knows.

    Args:
        stock: the configuration object of transformers that was made of `config`.
        config: the contents of a `config.json`.
    """
    unknown = tuple(unknown_keys(stock, config))
    if unknown:
        _warn(type(stock).__name__, unknown)


def unknown_keys(stock: Any, config: Mapping[str, Any], part: str = "") -> Iterator[str]:
    """Yield the keys that the class of `stock` does not know, with a guess what was meant.

    Configurations of parts (`text_config`) are looked into too; `part` is such a one's name.
    """
    known = _known(type(stock))  # type: ignore[arg-type]
    for key, value in config.items():
        inner = getattr(stock, key, None)
        if hasattr(inner, "to_dict") and isinstance(value, Mapping):
            yield from unknown_keys(inner, value, f"{key}.")
        elif key not in known and not key.startswith("_"):
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
            yield f"{part}{key}" + (f" (did you mean {near[0]}?)" if near else "")


@cache
def _known(stock_class: type) -> frozenset[str]:
    """Return the keys that a configuration class takes: its own, its parents' and everybody's."""
    from transformers import GenerationConfig

    names = set(_OF_OTHERS) | set(GenerationConfig().to_dict())
    # Some classes set what their signature does not name; a few cannot be made without arguments.
    with suppress(TypeError, ValueError):
        names |= set(stock_class().to_dict())
    for parent in stock_class.__mro__:
        names |= set(getattr(parent, "__annotations__", {}))
        names |= set(getattr(parent, "attribute_map", {}))
        if "__init__" in vars(parent):
            names |= set(inspect.signature(parent.__init__).parameters)  # type: ignore[misc]
    return frozenset(names)


@cache
def _warn(class_name: str, unknown: tuple[str, ...]) -> None:
    keys = ", ".join(unknown[:5]) + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
    log.warning("slimstate: warning: config.json has %s, which %s ignores", keys, class_name)
