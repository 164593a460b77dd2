"""Tiny models of the hybrids of Kimi Delta Attention."""

from typing import Any

import torch
from torch import nn

from pruning.planning.new_tensors import made
from pruning.planning.plan import Plan, planned_spaces
from pruning.repair.gates import gates_of
from pruning.transform.slices import slices_of

CONFIGS: dict[str, dict[str, Any]] = {
    "kimi_linear": {
        "model_type": "kimi_linear",
        "hidden_size": 40,
        "num_hidden_layers": 3,
        "vocab_size": 300,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "intermediate_size": 64,
        "moe_intermediate_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "kv_lora_rank": 24,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 12,
        "num_experts": 4,
        "num_experts_per_token": 2,
        "num_expert_group": 1,
        "topk_group": 1,
        "linear_num_heads": 3,
        "linear_head_dim": 18,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "pad_token_id": None,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "rms_norm_eps": 1e-4,
    },
    "glm5_next_text": {
        "model_type": "glm5_next_text",
        "hidden_size": 40,
        "num_hidden_layers": 3,
        "vocab_size": 300,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "intermediate_size": 64,
        "moe_intermediate_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "kv_lora_rank": 24,
        "q_lora_rank": 20,
        "qk_nope_head_dim": 8,
        "v_head_dim": 12,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "hc_mult": 2,
        # With few index heads the scores of several pools are zero, and chance chooses among them.
        "index_n_heads": 16,
        "index_head_dim": 16,
        "index_topk": 8,
        "index_kpool": 4,
        "linear_num_heads": 3,
        "linear_head_dim": 18,
        "layer_types": ["linear_attention", "indexed_attention", "linear_attention"],
        "pad_token_id": None,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "rms_norm_eps": 1e-4,
    },
}


def nested(config: dict[str, Any]) -> dict[str, Any]:
    """The same model as published checkpoints write it: sizes and layers in an object of their own,
    layers counted from 1."""
    rest = {k: v for k, v in config.items() if not k.startswith("linear_") and k != "layer_types"}
    types = config["layer_types"]
    rest["linear_attn_config"] = {
        "head_dim": config["linear_head_dim"],
        "num_heads": config["linear_num_heads"],
        "short_conv_kernel_size": 4,
        "kda_layers": [n + 1 for n, name in enumerate(types) if name == "linear_attention"],
        "full_attn_layers": [n + 1 for n, name in enumerate(types) if name != "linear_attention"],
    }
    return rest


@torch.no_grad()
def replace_gates_(model: nn.Module, plan: Plan) -> None:
    """Give a dense model the gates of a plan: its inner channels, and zeros in the others.

    Args:
        model: the dense model, changed in place.
        plan: its new tensors are in it.
    """
    parameters = dict(model.named_parameters())
    slices = slices_of(plan, plan.config_before)
    for space in planned_spaces(plan, plan.config_before):
        for first, second in gates_of(space):
            down, up = (made(plan.new_tensors[name]) for name in (first, second))
            rows = next(part.kept for part in slices[second] if part.dim == 0)
            for name in (first, second):
                parameters[name].zero_()
            parameters[first][: len(down)] = down.to(parameters[first])
            parameters[second][rows, : up.shape[1]] = up.to(parameters[second])
