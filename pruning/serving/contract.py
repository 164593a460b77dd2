"""The serving contract: which engines and kernels take which shapes of a recurrent state.

Each entry says which release it holds for, where it stands, and how it is known: read in the
engine's source, by calling the engine's own check without its hardware, or by running the kernel.
d_k and d_v are the key and value channels of a head.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

Evidence = Literal["read", "check run", "run"]
EVIDENCE: tuple[Evidence, ...] = ("read", "check run", "run")
"""From the weakest."""

ANY = 2**31
"""No upper bound."""


@dataclass(frozen=True)
class Shapes:
    """A set of pairs of d_k and d_v."""

    widths: tuple[int, ...] = ()
    """The d_k in it; none named stands for all up to `most` that are a multiple of `multiple_of`.
    """
    most: int = ANY
    multiple_of: int = 1
    square: bool = False
    """Whether d_v must be d_k."""

    def hold(self, key: int, value: int) -> bool:
        """Whether d_k `key` with d_v `value` is in the set."""
        if self.square and key != value:
            return False
        if self.widths:
            return key in self.widths
        return key <= self.most and key % self.multiple_of == 0

    def __str__(self) -> str:
        """The set in words, such as `d_k = d_v of 64 or 128`."""
        name = "d_k = d_v" if self.square else "d_k"
        if self.widths:
            return f"{name} of {' or '.join(map(str, self.widths))}"
        parts = [f"up to {self.most}"] if self.most < ANY else []
        parts += [f"a multiple of {self.multiple_of}"] if self.multiple_of > 1 else []
        return f"{name} {', '.join(parts) or 'of any width'}"


ALL = Shapes()
ONE_TILE = Shapes(widths=(128,), square=True)


@dataclass(frozen=True)
class Kernel:
    """One implementation of the delta rule within an engine."""

    name: str
    does: str
    """Prefill, decoding, or both."""
    where: str
    """The hardware that has it."""
    takes: Shapes
    chosen: Shapes | None
    """Where the engine chooses it unasked, whether or not it takes the shape; None for never."""
    source: str
    """Where the engine's check stands, or what was run."""
    evidence: Evidence = "read"
    flag: str = ""
    """What asks for it if `chosen` does not, or asks for another kernel if it is chosen wrongly."""
    only: tuple[str, ...] = ()
    """The families that it serves; none named stands for all of the engine's."""


@dataclass(frozen=True)
class Engine:
    """A release of an engine: the families that it has classes for, and its kernels."""

    program: str
    release: str
    classes: dict[str, str]
    """The class that loads a model, by `model_type`."""
    kernels: tuple[Kernel, ...]
    refused: dict[str, str] = field(default_factory=dict)
    """Why a family with a class is not served all the same, by `model_type`."""
    untied: tuple[str, ...] = ()
    """Families whose class has an output projection of its own: with tied embeddings, whose
    checkpoint holds none, it answers from unset weights, without a word."""
    flags: tuple[str, ...] = ()
    """What must be said for every model."""
    conv_widths: tuple[int, ...] = ()
    """Taps of the short convolution that it takes; none named stands for all."""
    softmax_widths: tuple[int, ...] = ()
    """Channels of a softmax head that it takes; none named: as for the dense model."""


_QWEN = {
    "qwen3_5": "Qwen3_5ForConditionalGeneration",
    "qwen3_5_text": "Qwen3_5ForCausalLM",
    "qwen3_5_moe": "Qwen3_5MoeForConditionalGeneration",
    "qwen3_5_moe_text": "Qwen3_5MoeForCausalLM",
    "qwen3_next": "Qwen3NextForCausalLM",
}
_FLAT = tuple(name for name in _QWEN if name != "qwen3_next")
"""Families whose projections are not interleaved by key head."""

_GDN = "vllm/model_executor/layers/mamba/gdn/qwen_gdn_linear_attn.py"
_TRITON = "--gdn-prefill-backend triton"

VLLM_GPU = Engine(
    "vLLM",
    "0.32.0",
    {**_QWEN, "olmo_hybrid": "OlmoHybridForCausalLM"},
    (
        Kernel(
            "FlashInfer", "prefill", "Hopper", Shapes(most=128, multiple_of=8, square=True), ALL,
            f"{_GDN}: _resolve_gdn_prefill_backend; FlashInfer 0.7.2: delta_rule_sm90.py",
            evidence="check run", flag=_TRITON, only=tuple(_QWEN),
        ),
        Kernel(
            "FlashInfer", "prefill", "Blackwell", ONE_TILE, Shapes(widths=(128,)),
            f"{_GDN}: _resolve_gdn_prefill_backend; FlashInfer 0.7.2: gdn_prefill.py",
            evidence="check run", flag=_TRITON, only=tuple(_QWEN),
        ),
        Kernel(
            "CuteDSL", "prefill", "Blackwell SM10x", ONE_TILE, None, f"{_GDN}: forward_cutedsl",
            flag="--gdn-prefill-backend cutedsl", only=tuple(_QWEN),
        ),
        Kernel(
            "fused CUDA", "speculative decoding", "SM80 and later", ONE_TILE, ONE_TILE,
            f"{_GDN}: _fused_gdn_decode_unsupported_reason", evidence="check run", only=_FLAT,
        ),
        Kernel(
            "FlyDSL", "prefill", "ROCm", ONE_TILE, None, f"{_GDN}: _resolve_gdn_prefill_backend",
            flag="--gdn-prefill-backend aiter_flydsl", only=tuple(_QWEN),
        ),
        Kernel(
            "Triton", "prefill and decoding", "any GPU", Shapes(most=256), ALL,
            "vllm/third_party/flash_linear_attention/ops/chunk_delta_h.py: assert K <= 256",
        ),
    ),
    untied=("qwen3_next",),
)  # fmt: skip

_ON_A_CPU = Kernel(
    "C++",
    "prefill and decoding",
    "a CPU with AVX-512 BF16",
    Shapes(widths=(64, 128), square=True),
    ALL,
    "vllm._custom_ops.chunk_gated_delta_rule_cpu, by benchmarks/engine_checks.py",
    evidence="check run",
    only=("qwen3_5", "qwen3_5_moe"),
)

VLLM_CPU = Engine(
    "vLLM on a CPU",
    "0.32.0",
    _QWEN,
    (
        replace(
            _ON_A_CPU,
            source="models behind the server, by benchmarks/serve_vllm.py",
            evidence="run",
            only=("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next"),
        ),
        _ON_A_CPU,
    ),
    refused={"olmo_hybrid": "its layer has Triton kernels alone, which a CPU lacks"},
    untied=("qwen3_next",),
    flags=("--dtype bfloat16",),
    conv_widths=(4,),
    softmax_widths=(32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512),
)

_SGLANG_GDN = "sglang/srt/layers/attention/linear/gdn_backend.py"

SGLANG = Engine(
    "SGLang",
    "0.5.23",
    _QWEN,
    (
        Kernel(
            "FlashInfer", "prefill", "Hopper, SM100", ONE_TILE, ONE_TILE,
            f"{_SGLANG_GDN}: flashinfer_gdn_prefill_default",
        ),
        Kernel(
            "CuteDSL", "prefill", "SM100", ONE_TILE, None,
            "sglang/srt/layers/attention/linear/kernels/gdn_cutedsl.py",
            flag="--linear-attn-prefill-backend cutedsl",
        ),
        Kernel(
            "Triton", "prefill and decoding", "any GPU", Shapes(most=256), ALL,
            "sglang/kernels/ops/attention/fla/chunk_delta_h.py: assert K <= 256",
        ),
    ),
    untied=("qwen3_next",),
)  # fmt: skip

_MLX_GATED_DELTA = "mlx_lm/models/gated_delta.py"

MLX_LM = Engine(
    "mlx-lm",
    "0.32.0",
    {
        "qwen3_5": "qwen3_5.Model",
        "qwen3_5_moe": "qwen3_5_moe.Model",
        "qwen3_next": "qwen3_next.Model",
        "olmo_hybrid": "olmo_hybrid.Model",
    },
    (
        Kernel(
            "packed Metal", "prefill", "Apple GPU", Shapes(widths=(128,)), Shapes(widths=(128,)),
            f"{_MLX_GATED_DELTA}: gated_delta_kernel",
        ),
        Kernel(
            "Metal", "prefill and decoding", "Apple GPU", Shapes(multiple_of=32),
            Shapes(multiple_of=32), f"{_MLX_GATED_DELTA}: gated_delta_update",
        ),
        Kernel(
            "array operations", "prefill and decoding", "any device", ALL, ALL,
            f"{_MLX_GATED_DELTA}: gated_delta_ops",
        ),
    ),
)  # fmt: skip

ENGINES: dict[str, Engine] = {
    "vllm-gpu": VLLM_GPU,
    "vllm-cpu": VLLM_CPU,
    "sglang": SGLANG,
    "mlx-lm": MLX_LM,
}
"""By the names that `--for` takes."""
