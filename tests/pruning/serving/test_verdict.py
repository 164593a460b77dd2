"""What is said of a model: engines, kernels, flags and tensor-parallel sizes."""

from typing import Any

import pytest

from flame.errors import UserError
from pruning.serving.contract import ENGINES
from pruning.serving.shape import served_shape
from pruning.serving.verdict import (
    Verdict,
    check_family,
    check_parallel,
    check_served,
    serving_lines,
    verdicts,
)

DENSE: dict[str, Any] = {
    "model_type": "qwen3_5_text",
    "hidden_size": 5120,
    "num_hidden_layers": 64,
    "num_attention_heads": 24,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "intermediate_size": 17408,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 48,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
}
KEY = DENSE | {"linear_key_head_dim": 64}
SQUARE = KEY | {"linear_value_head_dim": 64}
HEADS = DENSE | {"linear_num_key_heads": 8, "linear_num_value_heads": 24}
VALUE_HEADS = DENSE | {"linear_num_value_heads": 16}


def verdict(name: str, config: dict[str, Any]) -> Verdict:
    (found,) = verdicts(config, [name], DENSE)
    return found


@pytest.mark.parametrize("fewer", [HEADS, VALUE_HEADS])
def test_whole_heads_and_value_heads_keep_every_kernel(fewer: dict[str, Any]) -> None:
    for name in ("vllm-gpu", "vllm-cpu", "sglang"):
        found = verdict(name, fewer)
        assert found.refusal is None and found.lost == () and found.parallel == (1, 2, 4, 8)
        assert found.kernels == verdict(name, DENSE).kernels


def test_key_channels_alone_leave_triton_and_need_a_flag_on_hopper() -> None:
    found = verdict("vllm-gpu", KEY)
    assert [kernel.name for kernel in found.kernels] == ["Triton"]
    assert found.flags == ("--gdn-prefill-backend triton on Hopper",)
    assert {kernel.name for kernel in found.lost} == {
        "FlashInfer", "CuteDSL", "fused CUDA", "FlyDSL"
    }  # fmt: skip
    assert "64 x 128" in str(verdict("vllm-cpu", KEY).refusal)
    assert verdict("sglang", KEY).refusal is None


def test_value_channels_alone_need_the_flag_on_blackwell_too() -> None:
    """vLLM looks at d_k = 128 there, and not at d_v."""
    found = verdict("vllm-gpu", DENSE | {"linear_value_head_dim": 64})
    assert found.flags == tuple(
        f"--gdn-prefill-backend triton on {card}" for card in ("Hopper", "Blackwell")
    )


def test_a_square_runs_on_a_cpu() -> None:
    found = verdict("vllm-cpu", SQUARE)
    assert (found.refusal, found.model_class) == (None, "Qwen3_5ForCausalLM")
    assert found.flags == ("--dtype bfloat16",) and found.evidence == "run"
    whole = {"model_type": "qwen3_5", "text_config": SQUARE}
    assert verdict("vllm-cpu", whole).evidence == "check run"
    assert (
        verdict("vllm-gpu", SQUARE).flags == () and verdict("vllm-gpu", SQUARE).evidence == "read"
    )


def test_published_checkpoints_with_vision_have_a_class_of_their_own() -> None:
    whole = {"model_type": "qwen3_5", "text_config": DENSE}
    found = verdict("vllm-gpu", whole)
    assert found.model_class == "Qwen3_5ForConditionalGeneration"
    assert found.parallel == (1, 2, 4, 8)


@pytest.mark.parametrize(
    ("change", "name", "reason"),
    [
        ({"linear_conv_kernel_dim": 3}, "vllm-cpu", "3 taps, it takes 4"),
        ({"model_type": "qwen3_next", "tie_word_embeddings": True}, "vllm-gpu", "does not tie"),
        ({"model_type": "qwen3_next", "tie_word_embeddings": True}, "sglang", "does not tie"),
        ({"head_dim": 48}, "vllm-cpu", "softmax heads of 48 channels"),
        ({"linear_key_head_dim": 264}, "vllm-gpu", "264 x 128.*d_k up to 256"),
        ({"model_type": "olmo_hybrid"}, "vllm-cpu", "Triton kernels alone"),
        ({"model_type": "olmo_hybrid"}, "sglang", "no class for olmo_hybrid"),
        ({}, "mlx-lm", "no class for qwen3_5_text"),
    ],
)
def test_refusals_say_why(change: dict[str, Any], name: str, reason: str) -> None:
    with pytest.raises(UserError, match=f"{name} does not serve this model: .*{reason}"):
        check_served(
            DENSE | change, ["sglang", name] if name != "sglang" and not change else [name]
        )


def test_a_family_without_a_class_anywhere_is_one_line() -> None:
    config = {"model_type": "gated_deltanet"}
    assert served_shape(config) is None
    assert serving_lines(config) == [
        "no serving engine has a class for gated_deltanet: transformers loads it"
    ]
    for check in (lambda: check_family(config, ["vllm-cpu"]), lambda: check_parallel(config, 2)):
        with pytest.raises(UserError, match="no serving engine has a class"):
            check()


@pytest.mark.parametrize("family", ["kimi_linear", "glm5_next"])
def test_engines_that_were_not_read_are_not_denied(family: str) -> None:
    """vLLM and SGLang do have classes for hybrids of Kimi Delta Attention."""
    config: dict[str, Any] = {"model_type": family}
    if family == "glm5_next":
        config["text_config"] = {"model_type": "glm5_next_text"}
    said = f"the serving contract says nothing of {family} yet"
    assert serving_lines(config) == [f"{said}: transformers loads it"]
    with pytest.raises(UserError, match=f"vllm-gpu does not serve this model: {said}"):
        check_family(config, ["vllm-gpu"])


def test_a_line_for_each_engine() -> None:
    lines = serving_lines(KEY, DENSE)
    assert [line.split()[0] for line in lines] == list(ENGINES)
    assert "the dense model has FlashInfer (Hopper), FlashInfer (Blackwell)" in lines[0]


def test_tensor_parallel_sizes_divide_everything_that_is_split() -> None:
    shape = served_shape(HEADS)
    assert shape is not None
    assert shape.parallel_sizes() == [1, 2, 4, 8]
    six = DENSE | {"linear_num_key_heads": 6, "linear_num_value_heads": 18}
    with pytest.raises(UserError, match=r"4: 6 key heads do not divide by 4; .* are 1, 2$"):
        check_parallel(six, 4)
    with pytest.raises(UserError, match=r"16: 24 softmax heads do not divide by 16"):
        check_parallel(DENSE, 16)
    narrow = DENSE | {"num_key_value_heads": 3, "num_attention_heads": 48}
    with pytest.raises(UserError, match=r"3 key-value heads are no divisor"):
        check_parallel(narrow, 2)
    check_parallel(narrow | {"num_key_value_heads": 2}, 4)


def test_experts_are_split_and_the_dense_layer_that_they_replace_is_not() -> None:
    moe = DENSE | {
        "model_type": "qwen3_5_moe_text", "num_experts": 8, "moe_intermediate_size": 6
    }  # fmt: skip
    shape = served_shape(moe)
    assert shape is not None and shape.parallel_sizes() == [1, 2]
    assert "channels of an expert" in str(shape.against_parallel(4))
