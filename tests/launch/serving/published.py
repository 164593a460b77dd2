"""Shapes of published hybrid models: what decides sizes, under the keys of their config.json."""

from typing import Any

QWEN3_5: dict[str, Any] = {
    "model_type": "qwen3_5_text",
    "vocab_size": 248320,
    "head_dim": 256,
    "linear_num_key_heads": 16,
}

PUBLISHED: dict[str, tuple[dict[str, Any], float, float, float]] = {
    "Qwen3.5-0.8B": (
        QWEN3_5
        | {
            "hidden_size": 1024,
            "intermediate_size": 3584,
            "num_hidden_layers": 24,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "linear_num_value_heads": 16,
            "tie_word_embeddings": True,
        },
        0.75e9, 19.5, 12,
    ),
    "Qwen3.5-27B": (
        QWEN3_5
        | {
            "hidden_size": 5120,
            "intermediate_size": 17408,
            "num_hidden_layers": 64,
            "num_attention_heads": 24,
            "num_key_value_heads": 4,
            "linear_num_value_heads": 48,
        },
        26.9e9, 153.9, 64,
    ),
    "Qwen3.5-35B-A3B": (
        {
            "model_type": "qwen3_5_moe_text",
            "vocab_size": 248320,
            "hidden_size": 2048,
            "num_hidden_layers": 40,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "head_dim": 256,
            "num_experts": 256,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 512,
            "shared_expert_intermediate_size": 512,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": 32,
        },
        34.7e9, 64.4, 20,
    ),
    "Qwen3-Next-80B-A3B": (
        {
            "model_type": "qwen3_next",
            "vocab_size": 151936,
            "hidden_size": 2048,
            "num_hidden_layers": 48,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "head_dim": 256,
            "num_experts": 512,
            "num_experts_per_tok": 10,
            "moe_intermediate_size": 512,
            "shared_expert_intermediate_size": 512,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": 32,
        },
        79.7e9, 77.3, 24,
    ),
    "Olmo-Hybrid-7B": (
        {
            "model_type": "olmo_hybrid",
            "vocab_size": 100352,
            "hidden_size": 3840,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 30,
            "num_key_value_heads": 30,
            "linear_num_key_heads": 30,
            "linear_num_value_heads": 30,
            "linear_key_head_dim": 96,
            "linear_value_head_dim": 192,
        },
        7.43e9, 54.7, 120,
    ),
    "Kimi-Linear-48B-A3B": (
        {
            "model_type": "kimi_linear",
            "vocab_size": 163840,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "moe_intermediate_size": 1024,
            "num_hidden_layers": 27,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "num_experts": 256,
            "num_experts_per_token": 8,
            "kv_lora_rank": 512,
            "qk_rope_head_dim": 64,
            "linear_num_heads": 32,
            "linear_head_dim": 128,
            "layer_types": [
                "full_attention" if layer % 4 == 3 or layer == 26 else "linear_attention"
                for layer in range(27)
            ],
        },
        49.1e9, 43.4, 7.9,
    ),
    "GLM-5.3-Flash": (
        {
            "model_type": "glm5_next",
            "text_config": {
                "model_type": "glm5_next_text",
                "vocab_size": 154880,
                "hidden_size": 4096,
                "intermediate_size": 12288,
                "moe_intermediate_size": 2048,
                "num_hidden_layers": 45,
                "num_attention_heads": 64,
                "num_key_value_heads": 64,
                "n_routed_experts": 288,
                "num_experts_per_tok": 8,
                "kv_lora_rank": 512,
                "qk_rope_head_dim": 0,
                "linear_num_heads": 64,
                "linear_head_dim": 128,
            },
            "vision_config": {},
        },
        313.8e9, 148, 11,  # parameters as its class has them, vision tower included
    ),
}  # fmt: skip
"""By name: the config, its parameters, megabytes of fp32 state and bf16 windows a sequence, and
KiB of bf16 keys and values a token."""
