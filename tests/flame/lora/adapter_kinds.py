"""Adapters of every kind that peft has, made by peft on the tests' models."""

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.flame.tiny import GATED_DELTANET, LLAMA, build

UNTIED = {**GATED_DELTANET, "num_hidden_layers": 1}
TIED = LLAMA
BIASED = {**LLAMA, "attention_bias": True}
TARGETS = ["q_proj", "o_proj"]


def lora(**options: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(**{"r": 4, "lora_alpha": 10, "target_modules": TARGETS, **options})


def variants() -> dict[str, Any]:
    """Configurations whose adapters merge, by a name for each."""
    from peft import HRAConfig, IA3Config, LoHaConfig, LoKrConfig, OFTConfig
    from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig

    blocks = BdLoraConfig(target_modules_bd_a=["q_proj"], target_modules_bd_b=["o_proj"], nblocks=2)
    starts = ("gaussian", "eva", "orthogonal", "lora_ga", "pissa", "olora", "mica")
    patterns = {"rank_pattern": {"0.*q_proj": 6}, "alpha_pattern": {r"o_pr\w+|none": 3}}
    return {
        "lora": lora(),
        "rank-stabilised": lora(use_rslora=True),
        "patterns": lora(**patterns),
        "patterns, rank-stabilised": lora(**patterns, use_rslora=True),
        "dora": lora(use_dora=True),
        "biases": lora(bias="all"),
        "every linear module": lora(target_modules="all-linear"),
        "modules to save": lora(modules_to_save=["o_proj"], target_modules=["q_proj"]),
        **{start: lora(init_lora_weights=start) for start in starts},
        "pissa, patterns": lora(init_lora_weights="pissa", alpha_pattern={"q_proj": 3}),
        "kasa": lora(kasa_config=KasaConfig()),
        "velora": lora(velora_config=VeloraConfig()),
        "monteclora": lora(monteclora_config=MontecloraConfig()),
        "block-diagonal": lora(use_bdlora=blocks),
        "loha": LoHaConfig(r=4, alpha=10, target_modules=TARGETS, alpha_pattern={"q_proj": 2}),
        "lokr": LoKrConfig(r=4, alpha=10, target_modules=TARGETS),
        "ia3": IA3Config(target_modules=TARGETS, feedforward_modules=["o_proj"]),
        "oft": OFTConfig(oft_block_size=4, target_modules=["q_proj"]),
        "hra": HRAConfig(r=4, target_modules=TARGETS),
    }


def refused() -> dict[str, tuple[Any, str]]:
    """Configurations whose adapters are refused, by a name for each, and a word of the reason."""
    from peft import (
        AdaLoraConfig,
        BOFTConfig,
        FourierFTConfig,
        LNTuningConfig,
        PromptTuningConfig,
        VeraConfig,
    )

    return {
        "pissa_niter": (lora(init_lora_weights="pissa_niter_4"), "anew at each load"),
        "alora": (lora(alora_invocation_tokens=[1, 2], task_type="CAUSAL_LM"), "aLoRA"),
        "qalora": (lora(use_qalora=True, qalora_group_size=2), "use_qalora"),
        "parameters": (lora(target_modules=[], target_parameters=["q_proj.weight"]), "_parameters"),
        "tokens": (lora(trainable_token_indices=[1, 2]), "trainable_token_indices"),
        "bias of B": (lora(lora_bias=True), "has no bias"),
        "adalora": (AdaLoraConfig(total_step=9, init_r=4, target_modules=TARGETS), "ADALORA"),
        "boft": (BOFTConfig(boft_block_size=4, target_modules=["q_proj"]), "BOFT"),
        "fourier": (FourierFTConfig(n_frequency=9, target_modules=["q_proj"]), "FOURIERFT"),
        "norms": (LNTuningConfig(target_modules=["norm"]), "LN_TUNING"),
        "vera": (VeraConfig(r=4, target_modules=["q_proj"]), "VERA"),
        "prompt": (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), "PROMPT"),
    }


def save_adapters(folder: Path, config: Any, model: nn.Module) -> Path:
    """A peft folder of random adapters on `model`, which is changed."""
    from peft import get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(model, copy.deepcopy(config))  # type: ignore[arg-type]
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        adapted.save_pretrained(str(folder))
    return folder


def merged_by_peft(folder: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    """The model of `config` with the adapters in `folder` loaded and merged by peft."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = PeftModel.from_pretrained(build(config), str(folder))  # type: ignore[arg-type]
        merged = adapted.merge_and_unload()
    return {name: tensor.detach() for name, tensor in merged.named_parameters()}
