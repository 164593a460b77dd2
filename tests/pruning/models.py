"""Tiny models on a disk with a tokenizer and text to calibrate on, and reference computations."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from flame.checkpoint.save import save_step
from tests.pruning.families import build

GATED_DELTANET: dict[str, Any] = {
    "model_type": "gated_deltanet",
    "architectures": ["GatedDeltaNetForCausalLM"],
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_heads": 2,
    "num_v_heads": 4,
    "head_dim": 32,
    "expand_v": 0.75,
    "vocab_size": 300,
    "hidden_ratio": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
"""With grouped value heads, and value heads narrower than key heads."""

DELTA_NET: dict[str, Any] = {
    "model_type": "delta_net",
    "architectures": ["DeltaNetForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_heads": 2,
    "expand_k": 1.0,
    "expand_v": 0.5,
    "vocab_size": 300,
    "hidden_ratio": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}

FAMILIES = {"gated_deltanet": GATED_DELTANET, "delta_net": DELTA_NET}


def weights(config: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Random tensors of the stock model, by name."""
    state = build(config, seed=seed).state_dict()
    return {name: tensor.clone().contiguous() for name, tensor in state.items()}


def write_hf(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    """A Hugging Face folder without a tokenizer."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_run(
    folder: Path,
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    step: int = 7,
    recipe: str = "",
) -> Path:
    """A run folder with one step: weights, AdamW's moments, schedule, counters, loader state."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    if recipe:
        (folder / "recipe.toml").write_text(recipe)
    files = {"dataloader.json": b'{"next_sequence": 56}'}
    state = {**tensors, **training_state(tensors, step)}
    save_step(state, folder / "checkpoint", step, files, alone=True)
    return folder


def training_state(tensors: dict[str, Tensor], step: int) -> dict[str, Any]:
    """What torchtitan saves beside the model, under its names."""
    state: dict[str, Any] = {
        "lr_scheduler.last_epoch": step,
        "train_state.step": torch.tensor(step),
        "train_state.ntokens_seen": 1234,
    }
    generator = torch.Generator().manual_seed(5)
    for name, tensor in tensors.items():
        state[f"optimizer.state.{name}.step"] = torch.tensor(float(step))
        for moment in ("exp_avg", "exp_avg_sq"):
            random = torch.rand(tensor.shape, generator=generator)
            state[f"optimizer.state.{name}.{moment}"] = random
        state[f"optimizer.param_groups.{name}.lr"] = 1e-3
    return state


def write_text(folder: Path, lines: int = 120) -> Path:
    """A file of varied documents of some hundred bytes, and a tokenizer for them beside it."""
    from flame.data.tokenizer import train_tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    texts = [_document(generator, i) for i in range(lines)]
    file = folder / "text.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train_tokenizer(texts, 300, folder / "tokenizer")
    return file


def _document(generator: np.random.Generator, number: int) -> str:
    body = "".join(chr(c) for c in generator.integers(97, 123, 200))
    return f"def f{number}(x):\n    return x * {number} + {number**2 % 7}  # {body}\n"


def tensors_in(source: Any) -> dict[str, Tensor]:
    """All tensors of a source."""
    return {name: source.read(name) for name in source.names()}


def select_from_whole_matrix(matrix: Tensor, k: int, f: float = 1.5) -> list[int]:
    """Strong RRQR on the activations themselves: pivoted QR, then swaps, each factorised afresh."""
    columns = matrix.double().numpy()
    order = scipy.linalg.qr(columns, mode="r", pivoting=True)[1]
    while True:
        triangle = np.linalg.qr(columns[:, order], mode="r")
        inverse = np.linalg.inv(triangle[:k, :k])
        rows, rest = np.square(inverse).sum(1), np.square(triangle[k:, k:]).sum(0)
        growth = np.square(inverse @ triangle[:k, k:]) + np.outer(rows, rest)
        i, j = np.unravel_index(growth.argmax(), growth.shape)
        if growth[i, j] <= f * f:
            return sorted(order[:k].tolist())
        order[[i, k + j]] = order[[k + j, i]]


def recurrent_states(model: nn.Module, tokens: Tensor) -> list[tuple[int, Tensor]]:
    """(layer, states [B, H, d, d']) in a model's cache after `tokens` [B, T]."""
    with torch.no_grad():
        cache = model(input_ids=tokens, use_cache=True, logits_to_keep=1).past_key_values
    found = [(n, getattr(layer, "state", None) or {}) for n, layer in enumerate(cache.layers)]
    states = [(number, state.get("recurrent_state")) for number, state in found]
    return [(n, s) for n, s in states if isinstance(s, Tensor) and s.dim() == 4]
