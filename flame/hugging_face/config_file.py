"""A model's `config.json`: read, and refused where no model can be meant.

The module imports no torch, because checks before work starts use it.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flame.errors import UserError
from flame.storage.json_file import read_object

CONFIG_FILE = "config.json"

LARGEST = {
    "layer": 4096, "layers": 4096,
    "head": 1 << 16, "heads": 1 << 16, "experts": 1 << 16,
    "size": 1 << 28, "dim": 1 << 24, "embd": 1 << 24,
}  # fmt: skip
"""Largest whole number under a key that ends in the word: above it no model is meant, and building
one on the meta device would take hours or the memory of the machine."""

_QUANTISER_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
"""Files in which tools other than transformers say that they quantised a folder's weights."""

_QUANTISATION_KEYS = ("quantization_config", "compression_config")

_ON_LOAD = {
    "fp8": "FineGrainedFP8Config(dequantize=True)",
    "mxfp4": "Mxfp4Config(dequantize=True)",
    "compressed-tensors": "CompressedTensorsConfig(run_compressed=False)",
}
"""Configurations with which transformers dequantises while it loads, by method."""


def read_config(path: Path) -> dict[str, Any]:
    """Read a model's `config.json`.

    Raises:
        UserError: the file is missing or damaged, names no family, has a size that no model has, or
            is of a quantised model or of a vision tower alone.
    """
    config = read_object(
        path,
        missing=f"{path.parent} has no {path.name}: a model is a run folder, a step folder, a "
        "Hugging Face folder or a hub name",
    )
    if not isinstance(config.get("model_type"), str):
        raise UserError(f"{path} has no model_type: it is not a model's configuration")
    for key, value in _values(config):
        check_size(path, key, value)
    _check_not_quantised(path, config)
    _check_language(path, config)
    return config


def _check_language(path: Path, config: dict[str, Any]) -> None:
    """Refuse the config of a vision tower that no text model is with."""
    if isinstance(config.get("text_config"), dict) or "vocab_size" in config:
        return
    family = config["model_type"]
    if family.endswith(("_vision", "_vision_model")) or {"vision_config", "patch_size"} & {*config}:
        raise UserError(
            f"{path} is of a vision tower alone ({family}): it has neither text_config nor "
            "vocab_size; give the checkpoint that its text model is in"
        )


def vocabulary_size(config: dict[str, Any]) -> int:
    """Return `vocab_size` of a `config.json`; raise `UserError` unless it is a positive integer."""
    size = config.get("vocab_size")
    if not isinstance(size, int) or size < 1:
        raise UserError(f"config.json: vocab_size is {size!r}, expected a positive integer")
    return size


def check_size(path: Path, key: str, value: Any) -> None:
    """Raise `UserError` if `value` cannot be what a `config.json` has under `key`."""
    largest = LARGEST.get(re.split(r"[_.]", key)[-1])
    if largest is None or value is None or isinstance(value, list):
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or value % 1 != 0:
        raise UserError(f"{path}: {key} is {_shown(value)}, expected a whole number")
    if not 0 <= value <= largest:
        raise UserError(f"{path}: {key} is {_shown(value)}, expected 0 to {largest:,}")


def check_plain_folder(folder: Path) -> None:
    """Raise `UserError` if a file of a Hugging Face folder says that its weights are quantised."""
    for name in _QUANTISER_FILES:
        if (folder / name).is_file():
            raise UserError(f"{folder} is quantised, as {name} says; {dequantise_advice()}")


def _check_not_quantised(path: Path, config: Mapping[str, Any]) -> None:
    for key, value in _values(config):
        name = key.rpartition(".")[2]
        if name in _QUANTISATION_KEYS and value:
            method = value.get("quant_method") if isinstance(value, dict) else value
            method = str(method or "bitsandbytes")
            raise UserError(
                f"{path.parent} is quantised by {method}, as {key} in {path.name} says; "
                f"{dequantise_advice(method)}"
            )


def dequantise_advice(method: str = "") -> str:
    """Return, for an error line, how to get plain weights out of a quantised model.

    Without `save_original_format=False` transformers quantises again, and saves no scales.
    """
    if method in _ON_LOAD:
        how = f"from_pretrained(MODEL, quantization_config={_ON_LOAD[method]})"
    else:
        how = "from_pretrained(MODEL).dequantize()"
    return (
        "take the publisher's plain weights, or dequantise it first: "
        f"transformers.AutoModelForCausalLM.{how}"
        ".save_pretrained(PLAIN, save_original_format=False)"
    )


def keeps_documents_apart(config: Mapping[str, Any]) -> bool:
    """Return whether the class of `config` takes `cu_seqlens` and packs documents by them.

    fla's classes and ours do, and the hybrids of `flame.models.packed_hybrids`. Others of
    transformers ignore it, or refuse it in their convolution.
    """
    from flame.model import stock_config
    from flame.models.packed_hybrids import is_hybrid

    stock = stock_config(dict(config))
    return is_hybrid(stock) or type(stock).__module__.startswith(("fla.", "flame."))


def _values(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the items of a config and of its parts, with the part's name before the key."""
    yield from config.items()
    for key, part in config.items():
        if key.endswith("_config") and isinstance(part, dict):
            yield from ((f"{key}.{inner}", value) for inner, value in part.items())


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"
