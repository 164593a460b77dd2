"""Models of text and more: a vision tower, a head that predicts several tokens (MTP).

Their text model is what is trained and pruned here. What lies around it in their Hugging Face
folder goes along unchanged, where a Hugging Face folder is written of it. The module imports no
torch, because checks before work starts use it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TEXT_CONFIG = "text_config"
MTP = "mtp."
"""What the names of the tensors of an MTP head begin with; no class of transformers has them."""

_FOR_BOTH = ("dtype", "torch_dtype", "tie_word_embeddings")
"""Keys of the outer config that hold for the text model too, where that says nothing else."""

_OF_LOADERS = ("architectures", "dtype", "torch_dtype", "tie_word_embeddings")
"""Keys of a text model's config that an outer config has outside of it."""


@dataclass(frozen=True)
class OuterModel:
    """A Hugging Face folder that holds a text model and more."""

    folder: Path
    config: dict[str, Any]
    """Its whole `config.json`."""

    def config_around(self, text: Mapping[str, Any]) -> dict[str, Any]:
        """Return the whole config for a text model of the config `text`."""
        before = self.config.get(TEXT_CONFIG)
        if not isinstance(before, dict):
            return dict(text)
        own = {k: v for k, v in text.items() if k in before or k not in _OF_LOADERS}
        return {**self.config, TEXT_CONFIG: own}

    @property
    def promises_mtp(self) -> bool:
        """Whether the config speaks of an MTP head."""
        text = self.config.get(TEXT_CONFIG)
        parts = [self.config, *([text] if isinstance(text, dict) else [])]
        return any(part.get("mtp_num_hidden_layers") for part in parts)


def text_config(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the config of the text model that is part of a model; None if there is no such part.

    transformers' causal language model of such a config is the text model alone.
    """
    text = config.get(TEXT_CONFIG)
    if not isinstance(text, dict) or not isinstance(text.get("model_type"), str):
        return None
    return {**{key: config[key] for key in _FOR_BOTH if key in config}, **text}
