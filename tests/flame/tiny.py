"""Small real models for the tests of checkpoints: their configs, weights, folders and runs."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from flame.checkpoint.save import save_step

GATED_DELTANET: dict[str, Any] = {
    "model_type": "gated_deltanet",
    "architectures": ["GatedDeltaNetForCausalLM"],
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_heads": 2,
    "head_dim": 6,
    "expand_v": 1.5,
    "hidden_ratio": 2,
    "vocab_size": 67,
    "tie_word_embeddings": False,
    "dtype": "float32",
}
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 31,
    "tie_word_embeddings": True,
    "dtype": "float32",
}


def build(config: dict[str, Any], seed: int = 0) -> nn.Module:
    """The stock model of `config` with every parameter random."""
    from transformers import AutoModelForCausalLM

    from flame.model import stock_config

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(stock_config(config), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return model


def write_hf_folder(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    """A Hugging Face folder with tokenizer and generation config, in one file."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    (folder / "tokenizer.json").write_text('{"model": {}}')
    (folder / "tokenizer_config.json").write_text("{}")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What a Hugging Face folder of `model` holds: each shared tensor once."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def write_run(folder: Path, config: dict[str, Any], state: dict[str, Any], step: int = 3) -> Path:
    """A run folder with one step."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_step(state, folder / "checkpoint", step, alone=True)
    return folder
