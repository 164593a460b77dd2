"""A hash that identifies a model, equal for its HF and DCP forms; and a check for broken weights.

The hash covers samples of the weights: it tells models apart, but does not prove two equal.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from flame.checkpoint.source import TensorSource
from flame.errors import UserError
from flame.hugging_face.ties import own_names
from flame.process.dealing import share
from flame.process.progress import progress

SAMPLED_BLOCKS = 3
"""Blocks of rows of each tensor that are hashed."""

SAMPLED_BYTES = 4096
"""Least size of such a block."""

_NOISE = frozenset(
    {
        "architectures",
        "auto_map",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "initializer_range",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "return_dict",
        "torch_dtype",
        "transformers_version",
        "use_cache",
        "use_l2warp",
    }
)
"""Keys of a `config.json` that do not change what the model computes."""

_NOISE_PREFIXES = ("_", "fuse_")


def fingerprint(config: Mapping[str, Any], source: TensorSource) -> str:
    """Return 64 hexadecimal digits that identify a model.

    They are a SHA-256 over its `config.json` and each tensor's name, shape, dtype and sampled rows.
    Keys of the config that do not change what the model computes, and the second copy of a tied
    embedding, are left out, so the HF and DCP forms of one model give the same digits.
    """
    hasher = hashlib.sha256(canonical_config(config).encode())
    for name in progress(own_names(config, source.names()), "fingerprint"):
        info = source.info(name)
        hasher.update(f"\n{name} {list(info.shape)} {info.dtype}\n".encode())
        for rows in _sampled_rows(info.shape, info.dtype.itemsize):
            hasher.update(_bytes(source.read(name, rows)))
    return hasher.hexdigest()


def canonical_config(config: Mapping[str, Any]) -> str:
    """Return the keys of a `config.json` that shape the model, as one line of sorted JSON."""
    return json.dumps(_canonical(config), sort_keys=True, separators=(",", ":"))


def check_finite(source: TensorSource) -> None:
    """Raise `UserError` naming the first tensor that holds NaN or infinite values."""
    for _ in finite_parts(source):
        pass


def finite_parts(source: TensorSource, place: int = 0, sharers: int = 1) -> Iterator[int]:
    """Check a source as `check_finite` does; yield the bytes of each tensor after it is read.

    Number `place` of `sharers` ranks reads its share of the tensors alone.
    """
    for name in progress(share(source.names(), place, sharers), "check weights"):
        if not source.info(name).dtype.is_floating_point:
            continue
        tensor = source.read(name)
        if not is_finite(tensor):
            broken = int((~torch.isfinite(tensor.float())).sum())
            raise UserError(
                f"{name} holds {broken} NaN or infinite values: choose a checkpoint from before "
                "training diverged"
            )
        yield tensor.nbytes


def is_finite(tensor: Tensor) -> bool:
    """Return whether no value is NaN or infinite; 15 times as fast as `isfinite(…).all()`."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    if tensor.dtype.itemsize == 1:
        tensor = tensor.float()
    # Minimum and maximum are NaN if any value is.
    return all(math.isfinite(extreme) for extreme in torch.aminmax(tensor))


def _canonical(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {
            key: _canonical(item)
            for key, item in value.items()
            if not (item is None or key in _NOISE or key.startswith(_NOISE_PREFIXES))
        }
    if isinstance(value, list | tuple):
        return [_canonical(item) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _sampled_rows(shape: tuple[int, ...], itemsize: int) -> list[slice | None]:
    """Return the rows to hash: the first, the last and those half-way; None for a scalar."""
    if not shape:
        return [None]
    row_bytes = max(1, itemsize * torch.Size(shape[1:]).numel())
    length = -(-SAMPLED_BYTES // row_bytes)
    if shape[0] <= SAMPLED_BLOCKS * length:
        return [slice(0, shape[0])]
    last = shape[0] - length
    starts = [last * block // (SAMPLED_BLOCKS - 1) for block in range(SAMPLED_BLOCKS)]
    return [slice(start, start + length) for start in starts]


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
