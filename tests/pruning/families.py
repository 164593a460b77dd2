"""Tiny models of every family that pruning knows, in the variations that matter to it."""

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn

_COMMON: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "vocab_size": 80,
    "hidden_ratio": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
_HYBRID = {"layers": [1], "num_heads": 3, "rope_theta": 10000.0}

CONFIGS: dict[str, dict[str, Any]] = {
    "delta_net": {
        "model_type": "delta_net",
        **_COMMON,
        "num_heads": 2,
        "expand_k": 2 / 3,
        "expand_v": 1.0,
    },
    "delta_net hybrid, gated, no conv": {
        "model_type": "delta_net",
        **_COMMON,
        "num_heads": 3,
        "use_short_conv": False,
        "use_gate": True,
        "attn": _HYBRID,
    },
    "delta_net sum norm, relu, negative eigenvalues": {
        "model_type": "delta_net",
        **_COMMON,
        "num_heads": 2,
        "qk_norm": "sum",
        "qk_activation": "relu",
        "allow_neg_eigval": True,
    },
    "delta_net identity, no beta": {
        "model_type": "delta_net",
        **_COMMON,
        "num_heads": 2,
        "qk_activation": "identity",
        "use_beta": False,
    },
    "delta_net2, a kernel a head": {
        "model_type": "delta_net2",
        **_COMMON,
        "num_heads": 2,
        "expand_k": 2 / 3,
        "conv_sharing": "head",
        "qk_activation": "identity",
    },
    "delta_net2 hybrid, gated, a kernel a layer, shared by k and v": {
        "model_type": "delta_net2",
        **_COMMON,
        "num_heads": 3,
        "use_gate": True,
        "share_kv_conv": True,
        "attn": _HYBRID,
    },
    "delta_net2, a token shift a channel": {
        "model_type": "delta_net2",
        **_COMMON,
        "num_heads": 2,
        "conv_sharing": "channel",
        "shift_only_conv": True,
    },
    "gated_deltanet": {
        "model_type": "gated_deltanet",
        **_COMMON,
        "num_heads": 2,
        "head_dim": 16,
        "expand_v": 1.5,
    },
    "gated_deltanet grouped values, hybrid": {
        "model_type": "gated_deltanet",
        **_COMMON,
        "num_heads": 2,
        "num_v_heads": 4,
        "head_dim": 18,
        "expand_v": 2.0,
        "attn": [_HYBRID],
        "allow_neg_eigval": True,
    },
    "gated_deltaproduct": {
        "model_type": "gated_deltaproduct",
        **_COMMON,
        "num_heads": 2,
        "head_dim": 16,
        "expand_v": 1.5,
        "num_householder": 2,
        "use_forget_gate": True,
        "allow_neg_eigval": True,
    },
    "gated_deltaproduct hybrid, three steps, no decay, no gate": {
        "model_type": "gated_deltaproduct",
        **_COMMON,
        "num_heads": 3,
        "head_dim": 16,
        "expand_v": 1.0,
        "num_householder": 3,
        "use_forget_gate": False,
        "use_short_conv": False,
        "use_output_gate": False,
        "attn": _HYBRID,
    },
    "kda": {
        "model_type": "kda",
        **_COMMON,
        "num_heads": 2,
        "head_dim": 16,
        "expand_v": 1.5,
    },
    "kda grouped values, hybrid, bounded decay": {
        "model_type": "kda",
        **_COMMON,
        "num_heads": 2,
        "num_v_heads": 4,
        "head_dim": 18,
        "expand_v": 1.0,
        "attn": _HYBRID,
        "allow_neg_eigval": True,
        "safe_gate": True,
        "lower_bound": -5.0,
    },
    "gated_deltanet no conv, no gate": {
        "model_type": "gated_deltanet",
        **_COMMON,
        "num_heads": 3,
        "head_dim": 16,
        "expand_v": 1.0,
        "use_short_conv": False,
        "use_gate": False,
    },
}


def tiny_config(name: str, **changes: Any) -> dict[str, Any]:
    """A copy of one of `CONFIGS`."""
    return copy.deepcopy(CONFIGS[name]) | changes


def build(config: dict[str, Any], device: str = "cpu", seed: int = 0) -> nn.Module:
    """The stock model of `config` with seeded random weights, in evaluation mode."""
    from transformers import AutoConfig, AutoModelForCausalLM

    import flame.register  # noqa: F401

    torch.manual_seed(seed)
    with torch.device(device), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).eval()


@torch.no_grad()
def enlarge_stream_(model: nn.Module, factor: float = 2.0**20) -> nn.Module:
    """Multiply what adds to the residual stream by `factor`, and return `model`.

    All that reads the stream is a norm, so a model computes what it did with its norms' eps divided
    by factor². Output norms read the delta rule's outputs, which stay: theirs alone counts then.
    """
    for name, parameter in model.named_parameters():
        if name.endswith(("embeddings.weight", "o_proj.weight", "down_proj.weight")):
            parameter *= factor
    return model


def tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    """Random token ids, [rows, length]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(_COMMON["vocab_size"], (rows, length), generator=generator)
