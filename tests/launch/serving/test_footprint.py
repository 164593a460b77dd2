"""What serving keeps of a model: published shapes, and the caches of real models."""

from typing import Any

import pytest
import torch
from torch import Tensor

import flame.register  # noqa: F401
from flame.errors import UserError
from flame.model import stock_config
from launch.serving.capacity import Capacity, Server
from launch.serving.footprint import Experts, KeyValues, footprint
from tests.launch.serving.published import PUBLISHED

SMALL: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}
FLA = SMALL | {"num_heads": 2, "hidden_size": 64, "conv_size": 3}
ATTENTION = {"layers": [1], "num_heads": 4, "num_kv_heads": 2}
HYBRID = SMALL | {
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 3,
    "layer_types": ["linear_attention", "full_attention"],
    "pad_token_id": None,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 8,
}
SLIM = {"key": [[8, 16], [16, 24]], "value": [16, 32]}
CONFIGS: dict[str, dict[str, Any]] = {
    "delta_net": FLA | {"expand_k": 0.5},
    "delta_net and a window": FLA | {"attn": ATTENTION | {"window_size": 16}},
    "delta_net2": FLA | {"expand_k": 0.5},
    "slim_delta_net": FLA | {"widths": SLIM},
    "gated_deltanet": FLA | {"head_dim": 16, "num_v_heads": 4, "expand_v": 2.0},
    "slim_gated_deltanet": FLA | {"head_dim": 24, "expand_v": 2.0, "widths": SLIM},
    "gated_deltaproduct": FLA | {"head_dim": 16, "expand_v": 2.0, "num_householder": 2},
    "gated_deltaproduct and softmax": FLA | {"head_dim": 16, "attn": [ATTENTION]},
    "kda": FLA | {"head_dim": 16, "expand_v": 1.0},
    "qwen3_5_text": HYBRID,
    "qwen3_5_moe_text": HYBRID | EXPERTS,
    "qwen3_next": HYBRID | EXPERTS,
    "olmo_hybrid": HYBRID | {"num_key_value_heads": 2},
    "kimi_linear": HYBRID
    | EXPERTS
    | {
        "linear_num_heads": 2,
        "linear_head_dim": 16,
        "kv_lora_rank": 24,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "num_key_value_heads": 2,
        "num_expert_group": 1,
        "topk_group": 1,
    },
    "glm5_next_text": HYBRID
    | {
        "linear_num_heads": 2,
        "linear_head_dim": 16,
        "kv_lora_rank": 24,
        "q_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "num_key_value_heads": 2,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
        "mlp_layer_types": ["dense", "sparse"],
        "index_n_heads": 2,
        "index_head_dim": 8,
    },
}
TOKENS = 70


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models(name: str) -> None:
    config, parameters, megabytes, kibibytes = PUBLISHED[name]
    found = Capacity(footprint(config), Server(80 * 2**30))
    assert found.model.parameters == pytest.approx(parameters, rel=0.01)
    assert (found.state + found.conv) / 1e6 == pytest.approx(megabytes, rel=0.01)
    assert found.kv(1) / 1024 == pytest.approx(kibibytes, rel=0.01)


@pytest.mark.parametrize("family", CONFIGS)
def test_counts_are_those_of_a_real_cache(family: str) -> None:
    from transformers import AutoModelForCausalLM

    config = {"model_type": family.split()[0], **CONFIGS[family]}
    found = footprint(config)
    model = AutoModelForCausalLM.from_config(stock_config(config), dtype=torch.float32).eval()
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    with torch.no_grad():
        tokens = torch.randint(0, 64, (1, TOKENS))
        cache = model(input_ids=tokens, use_cache=True).past_key_values
    kept = _by_kind(cache)
    assert kept["state"] == found.state
    taps = config.get("conv_size") or config["linear_conv_kernel_dim"]
    assert kept["conv"] * (taps - 1) == found.conv * taps
    if family != "kimi_linear":  # whose cache in transformers holds the heads' keys and values
        assert kept["kv"] == found.kv(TOKENS)


def _by_kind(cache: Any) -> dict[str, int]:
    """Numbers in a cache of fla or transformers, summed over its layers."""
    counts = {"state": 0, "conv": 0, "kv": 0}
    for layer in cache.layers:
        held = {**vars(layer), **(getattr(layer, "state", None) or {})}
        for name, value in held.items():
            kind = {
                "recurrent_state": "state",
                "recurrent_states": "state",
                "conv_state": "conv",
                "conv_states": "conv",
                "attn_state": "kv",
                "keys": "kv",
                "values": "kv",
            }.get(name)
            if kind is not None:
                counts[kind] += sum(tensor.numel() for tensor in _tensors(value))
    return counts


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for each in value.values() for tensor in _tensors(each)]
    return [tensor for each in value or () for tensor in _tensors(each)]


def test_a_batch_reads_the_experts_that_it_draws() -> None:
    experts = Experts(count=8, chosen=2, parameters=800)
    draws = torch.rand(4000, 3, 8, generator=torch.Generator().manual_seed(0)).topk(2).indices
    drawn = torch.zeros(4000, 8).scatter_(1, draws.flatten(1), 1.0).mean() * 800
    assert experts.read(1) == pytest.approx(200)
    assert experts.read(3) == pytest.approx(float(drawn), rel=0.02)
    assert experts.read(10_000) == pytest.approx(800)


def test_a_table_that_is_only_looked_up_is_not_read() -> None:
    config = {"model_type": "delta_net", **FLA}
    apart = footprint(config | {"tie_word_embeddings": False})
    assert apart.parameters - apart.dense == 64 * 64
    tied = footprint(config | {"tie_word_embeddings": True})
    assert tied.parameters == tied.dense


def test_a_window_bounds_the_cache() -> None:
    layer = KeyValues(per_token=10, window=100)
    assert (layer.numbers(40), layer.numbers(4000)) == (400, 1000)


def test_a_layer_of_an_unknown_kind_is_refused() -> None:
    with pytest.raises(UserError, match=r"mamba2.*2 layers"):
        footprint({"model_type": "mamba2", **SMALL, "num_heads": 4, "head_dim": 16})
