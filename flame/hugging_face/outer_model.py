"""Models of text and more: a vision tower, a head that predicts several tokens (MTP).

Their text model is what is trained and pruned here. What lies around it in their Hugging Face
folder goes along unchanged, where a Hugging Face folder is written of it. The module imports no
torch, because checks before work starts use it.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flame.errors import UserError

TEXT_CONFIG = "text_config"
FLAT = {"glm5_next": "glm5_next_text"}
"""Families whose config may hold the text model's keys itself, and what the text model is then."""

MTP = "mtp."
"""What names of tensors of an MTP head begin with, unless it is numbered as layers after the last;
no class of transformers has them."""

_PREFIX = re.compile(r"(?:model\.)?(?:language_model\.)?")
"""Under what the text model's layers are found."""

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
            own_type = {"model_type": self.config["model_type"]} if is_flat(self.config) else {}
            return {**text, **own_type}
        own = {k: v for k, v in text.items() if k in before or k not in _OF_LOADERS}
        return {**self.config, TEXT_CONFIG: own}

    def has_mtp(self, names: Iterable[str]) -> bool:
        """Whether tensors of an MTP head are among `names`."""
        beginnings = (MTP, *self._mtp_layers())
        return any(_within_text(name).startswith(beginnings) for name in names)

    def check_mtp(self, names: Iterable[str]) -> None:
        """Raise UserError if layers of the MTP head that the config promises are not in `names`.

        A text model alone may lack them: its class in transformers saves none.
        """
        if text_config(self.config) is None:
            return
        there = [_within_text(name) for name in names]
        for layer, key in self._mtp_layers().items():
            if not any(name.startswith(layer) for name in there):
                raise UserError(
                    f"config.json of {self.folder} has an MTP head, but no tensor {layer}… is "
                    f"there: take the whole checkpoint, or set {key} to 0 in config.json if it "
                    "was left out on purpose"
                )

    def _mtp_layers(self) -> dict[str, str]:
        """How names of layers of the promised MTP head begin, with the key that promises them."""
        text = {**self.config, **(text_config(self.config) or {})}
        depth = text.get("num_hidden_layers")
        firsts = {"mtp_num_hidden_layers": ("mtp.layers.", 0)}
        firsts |= {"num_nextn_predict_layers": ("layers.", depth)} if depth else {}
        return {
            f"{beginning}{first + layer}.": key
            for key, (beginning, first) in firsts.items()
            for layer in range(text.get(key) or 0)
        }


def text_config(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the config of the text model that is part of a model; None if there is no such part.

    transformers' causal language model of such a config is the text model alone.
    """
    if is_flat(config):
        return {**config, "model_type": FLAT[config["model_type"]]}
    text = config.get(TEXT_CONFIG)
    if not isinstance(text, dict) or not isinstance(text.get("model_type"), str):
        return None
    return {**{key: config[key] for key in _FOR_BOTH if key in config}, **text}


def is_flat(config: Mapping[str, Any]) -> bool:
    """Return whether a config of text and more holds the text model's keys itself."""
    is_one = config.get("model_type") in FLAT and "vocab_size" in config
    return is_one and config.get(TEXT_CONFIG) is None


def _within_text(name: str) -> str:
    return _PREFIX.sub("", name, count=1)
