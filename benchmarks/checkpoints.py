"""Checkpoints of any size with random numbers, for measurements."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flame.checkpoint.source import TensorInfo
from flame.model import meta_model

MOMENTS = ("exp_avg", "exp_avg_sq")
_POOL = 1 << 22
"""Random numbers that the tensors are made of."""


def write_checkpoint(folder: Path, gigabytes: float, form: str) -> tuple[Path, int]:
    """A DeltaNet of about that size; its folder and the bytes of its largest tensor.

    Args:
        folder: to be written.
        gigabytes: 10⁹ bytes.
        form: `dcp` is a run folder with AdamW's moments in fp32, `hf` has the weights alone.
    """
    from flame.checkpoint.save import save_step
    from flame.hugging_face.model_folder import write_hf

    config = config_of_size(gigabytes * 1e9 / (12 if form == "dcp" else 4))
    infos = weights_of(config)
    largest = max(info.nbytes for info in infos.values())
    folder.mkdir(parents=True)
    if form == "hf":
        write_hf(folder, config, infos, random_reader(infos))
        return folder, largest
    (folder / "config.json").write_text(json.dumps(config))
    infos |= moments_of(infos)
    state = {name: info.promise() for name, info in infos.items()}
    save_step(state, folder / "checkpoint", 1, read=random_reader(infos), alone=True)
    return folder, largest


def config_of_size(parameters: float) -> dict[str, Any]:
    """A DeltaNet with about so many parameters: layers are added to a fixed width."""
    hidden = 2048 if parameters > 5e8 else 1024
    config = {
        "model_type": "delta_net",
        "architectures": ["DeltaNetForCausalLM"],
        "hidden_size": hidden,
        "num_heads": hidden // 128,
        "expand_k": 1.0,
        "expand_v": 1.0,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
    }
    one, two = (_count({**config, "num_hidden_layers": layers}) for layers in (1, 2))
    return {**config, "num_hidden_layers": max(1, round((parameters - one) / (two - one)) + 1)}


def weights_of(config: dict[str, Any]) -> dict[str, TensorInfo]:
    """Names, shapes and dtypes (fp32) of a model's tensors."""
    tensors = meta_model(config).state_dict()
    return {name: TensorInfo(tuple(t.shape), torch.float32) for name, t in tensors.items()}


def moments_of(infos: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """What AdamW keeps of each tensor, in the names of a step."""
    entries = {"step": TensorInfo((), torch.float32)}
    return {
        f"optimizer.state.{name}.{entry}": entries.get(entry, info)
        for name, info in infos.items()
        for entry in (*MOMENTS, "step")
    }


def random_reader(infos: dict[str, TensorInfo]) -> Callable[[str], Tensor]:
    """Gives each tensor random numbers, which are cheap to make: pieces of one pool."""
    pool = torch.randn(_POOL, generator=torch.Generator().manual_seed(0))

    def read(name: str) -> Tensor:
        info = infos[name]
        size = math.prod(info.shape)
        flat = torch.empty(size)
        for first in range(0, size, _POOL):
            part = flat[first : first + _POOL]
            part.copy_(pool[: len(part)])
        return flat.view(info.shape)

    return read


def _count(config: dict[str, Any]) -> int:
    return sum(math.prod(info.shape) for info in weights_of(config).values())
