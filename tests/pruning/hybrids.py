"""Tiny models of transformers' hybrids, whose softmax layers run on a CPU."""

from typing import Any

import torch
from torch import nn

SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "vocab_size": 80,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "intermediate_size": 96,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 24,
    "linear_num_key_heads": 3,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3_5_text": SIZES | {"model_type": "qwen3_5_text"},
    "qwen3_5_moe_text": SIZES | EXPERTS | {"model_type": "qwen3_5_moe_text"},
    "qwen4_exp_text": SIZES
    | EXPERTS
    | {
        "model_type": "qwen4_exp_text",
        "hc_count": 2,
        "hc_lowrank": 8,
        "ple_layer_ids": [1, 3],
        "ple_embed_dim": 16,
        "heads_per_ngram": 2,
        "ngram_vocab_size_base": 50,
        "make_ngram_vocab_size_divisible_by": 8,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 24,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "qwen3_next": SIZES | EXPERTS | {"model_type": "qwen3_next"},
    "olmo_hybrid": SIZES
    | {"model_type": "olmo_hybrid", "num_key_value_heads": 2, "linear_num_value_heads": 3},
}


def build(config: dict[str, Any], seed: int = 0) -> nn.Module:
    """The stock model of `config` with seeded random weights, in evaluation mode."""
    from transformers import AutoModelForCausalLM

    from flame.model import stock_config

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(stock_config(config))
    for name, parameter in model.named_parameters():
        if name.endswith("ple.conv1d.weight"):  # zeros at first, which would hide what it does
            nn.init.normal_(parameter, std=config["initializer_range"])
    return one_by_one(model.eval())


def alone_and_packed(config: dict[str, Any]) -> tuple[nn.Module, nn.Module]:
    """The stock model, and this project's, which keeps packed documents apart; float64."""
    from flame.model import meta_model, restore_after_to_empty

    alone, packed = build(config), meta_model(config)
    packed.to_empty(device="cpu")
    packed.load_state_dict(alone.state_dict())
    restore_after_to_empty(packed)
    return alone.double(), one_by_one(packed.eval()).double()


def reloaded(folder: Any) -> nn.Module:
    """The model of a folder as a user loads it, in float64."""
    from transformers import AutoModelForCausalLM

    return one_by_one(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval())


def one_by_one(model: nn.Module) -> nn.Module:
    """The model, its experts run one after another: torch's grouped product has no float64."""
    if any(getattr(model.config, key, None) for key in ("num_experts", "n_routed_experts")):
        model.set_experts_implementation("eager")
    return model


def output_norms(model: nn.Module) -> list[nn.Module]:
    """The norms of the linear layers' outputs."""
    names = ("linear_attn.norm", "linear_attn.o_norm")
    return [module for name, module in model.named_modules() if name.endswith(names)]


def shrink_output_eps(dense: nn.Module, spaces: Any, kept: Any) -> None:
    """Give a masked model the output norms of a pruned one whose class has no knob for their eps.

    The pruned outputs are larger, which is a smaller eps under the masked ones.
    """
    shrunk = {space.kind: len(kept[space.name][0]) / space.head_dim for space in spaces}
    for norm in output_norms(dense):
        getattr(norm, "inner", norm).variance_epsilon *= shrunk.get("key", 1.0)


def set_eps(model: nn.Module, eps: float) -> None:
    """Give the norms of a model this eps, but for those of the linear layers' outputs."""
    outputs = output_norms(model)
    for module in model.modules():
        if module not in outputs:
            for name in ("eps", "variance_epsilon"):
                if hasattr(module, name):
                    setattr(module, name, eps)
