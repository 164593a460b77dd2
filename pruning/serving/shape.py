"""What an engine must know of a model to serve it, read from its config.json."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from flame.hugging_face.outer_model import text_config
from pruning.adapters import ADAPTERS
from pruning.adapters.hybrids import Hybrid
from pruning.adapters.interface import Config
from pruning.adapters.projections import positive_integer, with_defaults

SPLIT = {
    "linear_num_key_heads": "key heads",
    "linear_num_value_heads": "value heads",
    "num_attention_heads": "softmax heads",
    "intermediate_size": "channels of a feed-forward layer",
    "moe_intermediate_size": "channels of an expert",
}
"""What tensor parallelism divides among the processes, by the config's key."""

CONV_WIDTH = 4
"""Taps of the short convolution in a config that does not say."""


@dataclass(frozen=True)
class ServedShape:
    """The sizes of a hybrid's linear layers, and what else engines look at."""

    family: str
    """`model_type`, as engines look it up."""
    key_width: int
    value_width: int
    conv_width: int
    softmax_width: int | None
    """Channels of a softmax head; None if the config does not say."""
    tied: bool = False
    """Whether the output projection is the embedding."""
    split: dict[str, int] = field(default_factory=dict)
    """What is divided among tensor-parallel processes, by its name."""
    kv_heads: int | None = None
    """Key-value heads of softmax layers: divided, or repeated where there are fewer."""

    @property
    def widths(self) -> str:
        """The state of a head in words, such as `64 x 128`."""
        return f"{self.key_width} x {self.value_width}"

    def against_parallel(self, size: int) -> str | None:
        """Why `size` tensor-parallel processes cannot share the model; None if they can."""
        for noun, count in self.split.items():
            if count % size:
                return f"{count} {noun} do not divide by {size}"
        kv = self.kv_heads
        if kv is not None and kv % size and size % kv:
            return f"{kv} key-value heads are no divisor and no multiple of {size}"
        return None

    def parallel_sizes(self) -> list[int]:
        """The numbers of tensor-parallel processes that can share the model, from 1."""
        most = min(self.split.values())
        return [size for size in range(1, most + 1) if self.against_parallel(size) is None]


def served_shape(config: Config) -> ServedShape | None:
    """The shape of a model by its config.json; None for a family that no engine has a class for.

    Raises:
        UserError: the config's sizes do not go together, or it has no linear layer.
    """
    text = text_config(config) or config
    adapter = ADAPTERS.get(str(text.get("model_type")))
    if not isinstance(adapter, Hybrid):
        return None
    adapter.check(text)
    full = with_defaults(text, adapter.defaults)
    sizes = adapter.sizes(full)
    return ServedShape(
        family=str(config["model_type"]),
        key_width=sizes.key_width,
        value_width=sizes.value_width,
        conv_width=_if_any(full, "linear_conv_kernel_dim") or CONV_WIDTH,
        softmax_width=_softmax_width(full),
        tied=bool(full.get("tie_word_embeddings", False)),
        split=dict(_split(full)),
        kv_heads=_if_any(full, "num_key_value_heads"),
    )


def _split(full: dict[str, Any]) -> Iterator[tuple[str, int]]:
    dense = "num_experts" not in full
    for key, noun in SPLIT.items():
        if key in full and (dense or key != "intermediate_size"):
            yield noun, positive_integer(full, key)


def _softmax_width(full: dict[str, Any]) -> int | None:
    heads = _if_any(full, "num_attention_heads")
    hidden = positive_integer(full, "hidden_size")
    return _if_any(full, "head_dim") or (hidden // heads if heads else None)


def _if_any(full: dict[str, Any], key: str) -> int | None:
    return None if full.get(key) is None else positive_integer(full, key)
